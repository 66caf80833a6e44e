"""The samples as a Lightning data module: an endless, resumable training stream and fixed held-out sets."""

import itertools
from collections.abc import Iterator, Mapping, Sized
from functools import partial
from typing import Any

import torch
from lightning import LightningDataModule
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from transformers import PreTrainedTokenizerBase

from duo_id.common.errors import UserError
from duo_id.common.stopping import leave_to_main
from duo_id.data.registry import make_task
from duo_id.data.samples import Batch, Sample, Task, collate
from duo_id.data.settings import DataSettings
from duo_id.distributed.ranks import Ranks

COUNT_SETTINGS = {  # the settings for the number of samples that are used of a split
    "train": "method.samples",
    "validation": "comparison.validation_samples, or in a sweep comparison.samples",
    "test": "comparison.samples",
}


class SampleModule(LightningDataModule):
    """Training batches without end, and the first samples of the held-out splits.

    A step takes the `batch_size` global indices from `position` on, each group of ranks an equal block of them. The
    samples depend on nothing else: any number of workers and ranks, or a resumed run, sees what a single uninterrupted
    process sees.
    """

    def __init__(
        self,
        settings: DataSettings,
        tokenizer: PreTrainedTokenizerBase,
        seed: int,
        length_limit: int | None = None,
        num_validation: int = 0,
        ranks: Ranks | None = None,
        tasks: Mapping[str, Task] | None = None,
    ) -> None:
        """Keep the settings; a split's haystack is opened when its samples are first requested.

        Args:
            settings: of the samples.
            tokenizer: of the model.
            seed: of all samples.
            length_limit: the model's maximum number of tokens; None: no limit.
            num_validation: samples of the validation loader; 0: no loader.
            ranks: the processes that share a step; None: only this one.
            tasks: of splits, instead of those that the settings name.
        """
        super().__init__()
        self.settings, self.tokenizer, self.seed, self.length_limit = settings, tokenizer, seed, length_limit
        self.num_validation, self.ranks = num_validation, ranks or Ranks()
        self._tasks: dict[str, Task] = dict(tasks or {})
        self._start = {"position": 0, "global_step": 0}  # position and global step of the trainer at its start
        token_ids = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
        pad_id = next(token for token in token_ids if token is not None)
        self.collate = partial(collate, pad_id=pad_id, padding_side=settings.padding_side)

    def task(self, split: str) -> Task:
        """The task of one split, created on first use.

        Raises:
            UserError: it cannot make samples with these settings.
        """
        if split not in self._tasks:
            self._tasks[split] = make_task(self.settings, self.tokenizer, split, self.length_limit)
        return self._tasks[split]

    def samples(self, split: str, count: int) -> list[Sample]:
        """The first `count` samples of a split."""
        task = self.task(split)
        if isinstance(task, Sized) and count > len(task):  # one on disk
            settings, advice = self.settings, f"lower {COUNT_SETTINGS[split]}"
            if settings.task == "self":
                advice += ", or raise data.self_samples"
            folders = {"disk": f"data.path={settings.path}", "self": f"data.self_path={settings.self_path}"}
            source = folders.get(settings.task, "data")
            raise UserError(f"{count} {split} samples are requested, but {source} has {len(task)}: {advice}")
        return [task.sample(index, self.seed) for index in range(count)]

    @property
    def position(self) -> int:
        """Samples consumed by completed steps on all ranks; prefetched ones do not count."""
        if self.trainer is None:
            return self._start["position"]
        steps = self.trainer.global_step - self._start["global_step"]
        return self._start["position"] + steps * self.settings.batch_size

    def state_dict(self) -> dict[str, int]:
        """The position from which a resumed run continues."""
        step = self.trainer.global_step if self.trainer else 0
        return {"position": self.position, "global_step": step, "seed": self.seed}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Start the next training loader where the checkpointed run stopped, with any batch size and rank count."""
        if state_dict["seed"] != self.seed:
            raise UserError(f"resume: the run drew its samples with seed={state_dict['seed']}, not seed={self.seed}")
        self._start = {key: int(state_dict[key]) for key in ("position", "global_step")}

    def train_dataloader(self) -> DataLoader:
        """Endless batches of this rank."""
        return _TrainLoader(self)

    def val_dataloader(self) -> DataLoader | list[DataLoader]:
        """`num_validation` samples of the validation split, always the same."""
        if self.num_validation == 0:
            return []
        return DataLoader(
            self.samples("validation", self.num_validation),  # type: ignore[arg-type]  # a list is a map-style dataset
            batch_size=1,  # each sample is scored alone
            collate_fn=self.collate,
            pin_memory=torch.cuda.is_available(),
        )


class _TrainBatches(IterableDataset[Batch]):
    """The batches of one rank from `position` on; worker w of n makes batches w, w + n, ..."""

    def __init__(self, task: Task, module: SampleModule) -> None:
        self.task, self.seed, self.collate = task, module.seed, module.collate
        self.step, self.batch_size = module.settings.batch_size, module.settings.batch_size // module.ranks.data
        self.offset = module.ranks.data_rank * self.batch_size
        self.position = 0

    def __iter__(self) -> Iterator[Batch]:
        worker = get_worker_info()
        first, stride = (worker.id, worker.num_workers) if worker else (0, 1)
        for number in itertools.count(first, stride):
            start = self.position + number * self.step + self.offset
            yield self.collate([self.task.sample(start + row, self.seed) for row in range(self.batch_size)])


class _TrainLoader(DataLoader[Batch]):
    """Starts at the module's position on each iteration, which Lightning starts for every epoch."""

    def __init__(self, module: SampleModule) -> None:
        super().__init__(
            _TrainBatches(module.task("train"), module),
            batch_size=None,  # the dataset yields whole batches
            num_workers=module.settings.num_workers,
            worker_init_fn=leave_to_main,  # else a worker that dies raises an error in the middle of a step
            pin_memory=torch.cuda.is_available(),
        )
        self.module = module

    def __iter__(self) -> Any:
        self.dataset.position = self.module.position  # type: ignore[attr-defined]
        return super().__iter__()
