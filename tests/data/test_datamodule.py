import itertools
import os
import pickle
import signal
from types import SimpleNamespace

import pytest
import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from duo_id.common.errors import UserError
from duo_id.data.datamodule import SampleModule
from duo_id.data.samples import Sample, collate
from duo_id.distributed.ranks import Ranks


def row(*tokens):
    tokens = torch.tensor(tokens)
    return Sample(input_ids=tokens, labels=tokens + 10, answers=tokens + 20)


class Counting:
    """A task whose samples tell their index."""

    def __init__(self, *_):
        pass

    def sample(self, index, seed):
        return row(index)


class Recorder(LightningModule):
    """Trains one parameter and notes the indices of the samples it sees."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen, self.validated = [], []

    def training_step(self, batch, batch_idx):
        self.seen += batch["input_ids"][:, 0].tolist()
        return self.weight * 1.0

    def validation_step(self, batch, batch_idx):
        self.validated += batch["input_ids"][:, 0].tolist()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.fixture
def counting(quick, tokenizer, monkeypatch):
    monkeypatch.setattr("duo_id.data.datamodule.make_task", Counting)
    return lambda num_validation=0, **changes: SampleModule(
        quick(**changes), tokenizer, seed=0, num_validation=num_validation
    )


def fit(folder, module, max_steps, callbacks=(), resume=None, **options):
    """Train a recorder and return it with its trainer."""
    recorder = Recorder()
    trainer = Trainer(
        accelerator="cpu",
        max_steps=max_steps,
        logger=False,
        callbacks=list(callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=bool(callbacks),
        default_root_dir=folder,
        **options,
    )
    trainer.fit(recorder, module, ckpt_path=resume, weights_only=True)
    return recorder, trainer


@pytest.mark.parametrize("num_workers", [0, 2])
def test_resumed_run_sees_the_samples_of_an_undisturbed_one(tmp_path, counting, num_workers):
    settings = {"batch_size": 2, "num_workers": num_workers}
    every_third = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=3, save_top_k=-1)
    whole, trainer = fit(tmp_path, counting(**settings), 8, [every_third])
    assert whole.seen == list(range(16))
    assert trainer.num_training_batches == float("inf")
    for step in (3, 6):  # saved by the callback after a step
        resumed, _ = fit(tmp_path, counting(**settings), 8, resume=tmp_path / f"step={step}.ckpt")
        assert resumed.seen == whole.seen[2 * step :]

    _, trainer = fit(tmp_path, counting(**settings), 5)  # stopped, then saved by hand
    trainer.save_checkpoint(tmp_path / "stopped.ckpt")
    resumed, trainer = fit(tmp_path, counting(**settings), 7, resume=tmp_path / "stopped.ckpt")
    assert resumed.seen == whole.seen[10:14]
    trainer.save_checkpoint(tmp_path / "again.ckpt")  # a resumed run can be resumed
    resumed, _ = fit(tmp_path, counting(**settings), 8, resume=tmp_path / "again.ckpt")
    assert resumed.seen == whole.seen[14:]


def test_run_interrupted_in_mid_step_resumes_with_that_step(tmp_path, counting):
    class Interrupted(ModelCheckpoint):
        def on_train_batch_start(self, trainer, *_):
            if trainer.global_step == 4:
                trainer.save_checkpoint(tmp_path / "stop.ckpt")

    whole, _ = fit(tmp_path, counting(batch_size=3, num_workers=2), 6, [Interrupted(tmp_path)])
    resumed, _ = fit(tmp_path, counting(batch_size=3, num_workers=2), 6, resume=tmp_path / "stop.ckpt")
    assert resumed.seen == whole.seen[12:]


def test_resuming_with_another_batch_size_skips_and_repeats_nothing(tmp_path, counting):
    _, trainer = fit(tmp_path, counting(batch_size=3), 4)  # 12 samples
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    resumed, trainer = fit(tmp_path, counting(batch_size=2), 6, resume=tmp_path / "a.ckpt")
    assert resumed.seen == [12, 13, 14, 15]
    trainer.save_checkpoint(tmp_path / "b.ckpt")
    resumed, _ = fit(tmp_path, counting(batch_size=5), 7, resume=tmp_path / "b.ckpt")
    assert resumed.seen == [16, 17, 18, 19, 20]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_epochs_of_a_few_batches_go_on_in_the_stream(tmp_path, counting, num_workers):
    recorder, _ = fit(tmp_path, counting(num_workers=num_workers), 6, limit_train_batches=2, max_epochs=9)
    assert recorder.seen == [0, 1, 2, 3, 4, 5]


def test_validation_sees_the_same_few_samples_every_time(tmp_path, counting):
    module = counting(num_validation=3, batch_size=2)
    recorder, _ = fit(tmp_path, module, 4, val_check_interval=2, check_val_every_n_epoch=None, num_sanity_val_steps=0)
    assert recorder.validated == [0, 1, 2, 0, 1, 2]
    assert recorder.seen == list(range(8))


@pytest.mark.parametrize(("data", "sequence"), [(1, 1), (2, 1), (4, 1), (2, 2), (1, 3)])
def test_ranks_share_the_samples_of_each_step(counting, data, sequence):
    seen = []
    for rank in range(data * sequence):
        module = counting(batch_size=4)
        module.ranks = Ranks(data, sequence, rank)
        module.trainer = SimpleNamespace(global_step=0)
        module.load_state_dict({"position": 8, "global_step": 0, "seed": module.seed})
        batches = itertools.islice(module.train_dataloader(), 2)
        seen.append([batch["input_ids"][:, 0].tolist() for batch in batches])
        module.trainer.global_step = 5
        assert module.state_dict() == {"position": 8 + 5 * 4, "global_step": 5, "seed": module.seed}
    for group in range(data):
        assert all(seen[group * sequence + part] == seen[group * sequence] for part in range(sequence))
    for step in range(2):
        together = [index for group in range(data) for index in seen[group * sequence][step]]
        assert together == list(range(8 + 4 * step, 12 + 4 * step))


def test_workers_change_nothing(quick, tokenizer):
    def first_batches(num_workers):
        module = SampleModule(quick(num_workers=num_workers, batch_size=2), tokenizer, seed=3)
        return list(itertools.islice(module.train_dataloader(), 5))

    for alone, shared in zip(first_batches(0), first_batches(2), strict=True):
        for key in ("input_ids", "labels", "answers"):
            assert torch.equal(alone[key], shared[key])
        masks = alone["attention_mask"], shared["attention_mask"]
        assert masks == (None, None) or torch.equal(*masks)


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1"])
def test_workers_leave_signals_to_the_main_process(counting, name):
    """`timeout` signals every process of a run: a worker that died would raise an error in the middle of a step."""
    batches = iter(counting(num_workers=1).train_dataloader())
    assert next(batches)["input_ids"].tolist() == [[0]]
    (worker,) = batches._workers
    os.kill(worker.pid, signal.Signals[name])
    assert [next(batches)["input_ids"].item() for _ in range(6)] == [1, 2, 3, 4, 5, 6], "more than it had ready"
    assert worker.is_alive()


def test_training_batches_can_be_sent_to_workers_that_are_not_forked(quick, tokenizer):
    batches = SampleModule(quick(), tokenizer, seed=3).train_dataloader().dataset
    copy = pickle.loads(pickle.dumps(batches))
    assert torch.equal(next(iter(copy))["input_ids"], next(iter(batches))["input_ids"])


def test_held_out_samples_are_those_of_their_split(quick, tokenizer):
    module = SampleModule(quick(num_lengths=1), tokenizer, seed=0, num_validation=2)
    validation = [batch["input_ids"][0] for batch in module.val_dataloader()]
    test = [sample["input_ids"] for sample in module.samples("test", 3)]
    for split, rows, count in (("validation", validation, 2), ("test", test, 3)):
        assert len(rows) == count
        for index, tokens in enumerate(rows):
            assert torch.equal(tokens, module.task(split).sample(index, 0)["input_ids"])
            assert torch.equal(tokens, module.samples(split, count)[index]["input_ids"])


def test_no_held_out_samples_no_loader(quick, tokenizer):
    module = SampleModule(quick(), tokenizer, seed=0)
    assert module.val_dataloader() == []


def test_padding_on_the_right():
    batch = collate([row(1, 2, 3), row(4)], pad_id=9, padding_side="right")
    assert batch["input_ids"].tolist() == [[1, 2, 3], [4, 9, 9]]
    assert batch["labels"].tolist() == [[11, 12, 13], [14, -100, -100]]
    assert batch["answers"].tolist() == [[21, 22, 23], [24, 0, 0]]
    assert batch["attention_mask"].tolist() == [[True, True, True], [True, False, False]]


def test_padding_on_the_left():
    batch = collate([row(1, 2, 3), row(4)], pad_id=9, padding_side="left")
    assert batch["input_ids"].tolist() == [[1, 2, 3], [9, 9, 4]]
    assert batch["labels"].tolist() == [[11, 12, 13], [-100, -100, 14]]
    assert batch["answers"].tolist() == [[21, 22, 23], [0, 0, 24]]
    assert batch["attention_mask"].tolist() == [[True, True, True], [False, False, True]]


def test_nothing_padded_no_mask():
    assert collate([row(1, 2), row(3, 4)], pad_id=9, padding_side="left")["attention_mask"] is None


@pytest.mark.parametrize(("pad", "eos", "expected"), [(5, 6, 5), (None, 6, 6), (None, None, 0), (0, 6, 0)])
def test_pad_token_falls_back_to_eos_and_zero(quick, pad, eos, expected):
    tokenizer = SimpleNamespace(pad_token_id=pad, eos_token_id=eos)
    batch = SampleModule(quick(), tokenizer, seed=0).collate([row(1, 2), row(1)])
    assert batch["input_ids"][1, 1] == expected


def test_resuming_with_another_seed_is_refused(counting):
    module = counting()
    with pytest.raises(UserError, match=rf"seed={module.seed + 1}, not seed={module.seed}"):
        module.load_state_dict({"position": 8, "global_step": 2, "seed": module.seed + 1})
