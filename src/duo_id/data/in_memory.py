"""Samples from what a Python program holds: texts, a data set, or batches of tokens."""

import random
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import datasets
import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from duo_id.common.errors import UserError, check
from duo_id.data.haystack import Haystack
from duo_id.data.samples import UNSCORED, Sample, Task
from duo_id.data.settings import DataSettings
from duo_id.data.text import TextTask

WHOLE = {"train": (0.0, 1.0)}  # the region of the texts that samples are drawn from


class SampleList:
    """Finished samples, in another order on every pass through them."""

    def __init__(self, samples: Sequence[Sample]) -> None:
        """Keep the samples, at least one."""
        self.samples = samples

    def __len__(self) -> int:
        """How many there are."""
        return len(self.samples)

    def sample(self, index: int, seed: int) -> Sample:
        """Sample `index` of an endless run of passes, each in its own order of (seed, pass)."""
        number, position = divmod(index, len(self.samples))
        order = list(range(len(self.samples)))
        random.Random(f"{seed}:{number}").shuffle(order)
        return self.samples[order[position]]


def task_of(
    data: Any, settings: DataSettings, tokenizer: PreTrainedTokenizerBase, length_limit: int | None, text_key: str
) -> Task:
    """What `duo_id.identify` was given as `data`, as a task.

    Args:
        data: texts; a `datasets.Dataset` with a column of texts, or with the columns `input_ids` and `labels`; or
            batches, such as a `DataLoader` gives, mappings with `input_ids` and `labels` (tokens,) or (samples,
            tokens), and perhaps `attention_mask` and `answers`.
        settings: of the samples that are drawn from texts.
        tokenizer: of the model.
        length_limit: the most tokens that the model takes; None: it names no limit.
        text_key: the column with texts.

    Raises:
        UserError: it is none of these, is empty, or holds too little text.
    """
    if isinstance(data, datasets.Dataset) and text_key in data.column_names:
        data = data[text_key]
    elif isinstance(data, datasets.Dataset):
        lacking = {"input_ids", "labels"} - set(data.column_names)
        columns = ", ".join(data.column_names)
        check(not lacking, f"data: the data set has columns {columns}, neither {text_key} nor input_ids and labels")
        data = data.with_format("torch")
    check(isinstance(data, Iterable) and not isinstance(data, str | bytes | Mapping), f"data: {_kind(data)}")
    rows = list(data)
    check(bool(rows), "data is empty")
    if all(isinstance(row, str) for row in rows):
        sizes = np.array([len(row.encode()) for row in rows], dtype=np.int64)
        return TextTask(settings, tokenizer, "train", length_limit, Haystack(rows, sizes, "train", WHOLE))
    samples = [sample for row in rows for sample in _samples(row)]
    longest = max(len(sample["input_ids"]) for sample in samples)
    check(
        length_limit is None or longest <= length_limit,
        f"data: a sample has {longest} tokens, and the model takes {length_limit}",
    )
    return SampleList(samples)


def _kind(value: Any) -> str:
    return (
        f"a {type(value).__name__} is neither the name of a task, texts, a datasets.Dataset nor batches with input_ids "
        "and labels"
    )


def _samples(batch: Any) -> list[Sample]:
    """The samples of a batch without their padding."""
    if not (isinstance(batch, Mapping) and {"input_ids", "labels"} <= batch.keys()):
        raise UserError(f"data: {_kind(batch)}")
    columns = {key: _rows(batch[key]) for key in ("input_ids", "labels", "answers", "attention_mask") if key in batch}
    ids, labels = columns["input_ids"], columns["labels"]
    real = columns.get("attention_mask", torch.ones_like(ids)).bool()
    answers = columns.get("answers", (labels != UNSCORED).to(ids.dtype))
    check(
        all(rows.shape == ids.shape for rows in (labels, real, answers)),
        f"data: labels have the shape {tuple(labels.shape)} and input_ids {tuple(ids.shape)}",
    )
    samples = [
        Sample(input_ids=ids[row][kept], labels=labels[row][kept], answers=answers[row][kept])
        for row, kept in enumerate(real)
    ]
    check(
        all(bool((sample["labels"] != UNSCORED).any()) for sample in samples),
        f"data: a sample has no label but {UNSCORED}, so nothing in it can be scored",
    )
    return samples


def _rows(values: Any) -> Tensor:
    rows = torch.as_tensor(values).long().cpu()
    check(rows.dim() in (1, 2), f"data: tokens have the shape {tuple(rows.shape)}, not (samples, tokens)")
    return rows if rows.dim() == 2 else rows[None]
