"""Data sets of finished samples: a folder with a `datasets.DatasetDict` and a card that says how it was made."""

import hashlib
import json
import random
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
from transformers import PreTrainedTokenizerBase

from duo_id.common.documents import Data, Line, Natural, checked, read_json
from duo_id.common.errors import UserError, check, one_line
from duo_id.common.files import whole_folder
from duo_id.common.integrity import check_sums
from duo_id.data.samples import Sample, Task
from duo_id.data.settings import DataGenSettings, DataSettings

CARD = "card.json"
SPLITS = "dataset_dict.json"  # names them, as datasets has it
COLUMNS = ("input_ids", "labels", "answers")
KINDS = [datasets.List(datasets.Value(kind)) for kind in ("int32", "int64")]  # of a column
README = """\
---
pretty_name: {task} samples for identifying retrieval heads
tags: [duo_id, retrieval-heads]
configs:
- config_name: default
  data_files:
{files}
---

# {task} samples for identifying retrieval heads

Each row is one finished sample, three lists of the same length: `input_ids`, `labels` (the token where it is scored,
else -100) and `answers` (k at the tokens of the k-th asked answer, else 0); nothing is shifted. Read it with
`data=disk data.path=DIR` and a model with the same vocabulary. It was made with these settings:

```json
{card}
```
"""


class _Model(Data):
    """The model whose tokenizer was used."""

    name: Line


class _Settings(Data):
    """The settings of the samples."""

    model: _Model


class _Splits(Data):
    """The contents of `SPLITS`."""

    splits: list[Line]


class _Card(Data):
    """The fields of the card that are used."""

    settings: _Settings
    vocabulary: Line
    longest: Natural


class DiskTask:
    """Samples read from a folder that `write_dataset` made, in a different order on every pass."""

    def __init__(
        self, settings: DataSettings, tokenizer: PreTrainedTokenizerBase, split: str, length_limit: int | None = None
    ) -> None:
        """Memory-map the split.

        Args:
            settings: with the folder as `path`.
            tokenizer: of the model; its vocabulary must be that of the samples.
            split: train, validation or test.
            length_limit: the model's maximum number of tokens; None: no limit.

        Raises:
            UserError: the folder or split does not exist, its samples are not for this model, or a file is damaged.
        """
        path = Path(settings.path or "")
        check(path.is_dir(), f"data.path={path}: no such folder; data_gen/ writes one")
        check_sums(path, f"copy or write data.path={path} again", (CARD, SPLITS, split))
        try:
            card = checked(_Card, read_json(path / CARD), path / CARD)
            splits = checked(_Splits, read_json(path / SPLITS), path / SPLITS).splits
            rows = datasets.load_from_disk(str(path / split)) if split in splits else None
            if rows is not None and not (len(rows) and all(rows.features.get(column) in KINDS for column in COLUMNS)):
                raise UserError(f"the split {split} has no rows of {', '.join(COLUMNS)}, lists of whole numbers")
        except (OSError, ValueError, KeyError, TypeError, AttributeError, pa.ArrowException) as error:
            raise UserError(f"data.path={path} is not a dataset written by data_gen/: {one_line(error)}") from error
        model, longest = card.settings.model.name, card.longest
        check(
            card.vocabulary == vocabulary_hash(tokenizer),
            f"data.path={path} was made with the vocabulary of model={model}, which differs from this model's: choose "
            "that model or write the dataset again",
        )
        check(split in splits, f"data.path={path} has no {split} split, only {', '.join(splits)}")
        check(
            length_limit is None or longest <= length_limit,
            f"data.path={path} has samples of {longest} tokens, but the model takes {length_limit}: "
            "write the dataset again with a lower data.length_max",
        )
        assert rows is not None
        self.split = split
        self.rows = rows.with_format("torch")  # int64
        self._pass: tuple[tuple[int, int], list[int]] | None = None  # (seed, pass) and its order

    def __len__(self) -> int:
        """The number of samples of the split."""
        return len(self.rows)

    def sample(self, index: int, seed: int) -> Sample:
        """Row `index` of an endless sequence of passes, each shuffled by (seed, split, pass)."""
        pass_number, row_index = divmod(index, len(self.rows))
        row = self.rows[self._order(seed, pass_number)[row_index]]
        return Sample(**{column: row[column] for column in COLUMNS})  # type: ignore[typeddict-item]

    def _order(self, seed: int, pass_number: int) -> list[int]:
        if self._pass is None or self._pass[0] != (seed, pass_number):
            order = list(range(len(self.rows)))
            random.Random(f"{seed}:{self.split}:{pass_number}").shuffle(order)
            self._pass = (seed, pass_number), order
        return self._pass[1]


def write_dataset(settings: DataGenSettings, tokenizer: PreTrainedTokenizerBase, tasks: Mapping[str, Task]) -> Path:
    """Write the samples of each split to the new folder `settings.out`, whole or not at all.

    Args:
        settings: the number of samples, their seed, and all else on the card; empty splits are omitted.
        tokenizer: of the tasks.
        tasks: one for each split that has samples.

    Raises:
        UserError: the folder exists or cannot be written, or there are no samples to write.
    """
    out = Path(settings.out)
    check(not out.exists(), f"out={out} exists: choose another out or remove it")
    counts = {"train": settings.n, "validation": settings.n_validation, "test": settings.n_test}
    counts = {split: count for split, count in counts.items() if count > 0}
    check(bool(counts), f"n={settings.n}: there are no samples to write")
    longest = 0

    def rows(split: str) -> Iterator[dict[str, Any]]:
        nonlocal longest
        for index in range(counts[split]):
            sample = tasks[split].sample(index, settings.seed)
            longest = max(longest, len(sample["input_ids"]))
            yield {column: sample[column].numpy() for column in COLUMNS}  # type: ignore[literal-required]

    with whole_folder(out) as temporary:
        cache = temporary / "cache"
        try:
            splits = {
                split: datasets.Dataset.from_generator(
                    rows,
                    features=datasets.Features({column: datasets.List(datasets.Value("int32")) for column in COLUMNS}),
                    cache_dir=str(cache),
                    gen_kwargs={"split": split},
                    split=split,
                    fingerprint=split,  # the cache is not shared
                    writer_batch_size=32,  # samples in memory at a time
                )
                for split in counts
            }
        except datasets.exceptions.DatasetGenerationError as error:  # has no message of its own
            if isinstance(error.__cause__, OSError):
                reason = error.__cause__.strerror or error.__cause__
                raise UserError(f"out={out} cannot be written ({reason}): make room there") from error
            raise
        datasets.DatasetDict(splits).save_to_disk(str(temporary))
        shutil.rmtree(cache)
        card = {
            "settings": asdict(settings),
            "samples": counts,
            "longest": longest,
            "vocabulary": vocabulary_hash(tokenizer),
        }
        text = json.dumps(card, indent=2)
        files = "\n".join(f"  - split: {split}\n    path: {split}/*.arrow" for split in counts)
        (temporary / CARD).write_text(text + "\n", encoding="utf-8")
        readme = README.format(task=settings.data.task, files=files, card=text)
        (temporary / "README.md").write_text(readme, encoding="utf-8")
    return out


def vocabulary_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 of the tokens and their ids: tokenizers with the same one read the same samples."""
    return hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()
