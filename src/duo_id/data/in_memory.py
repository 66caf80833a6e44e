"""Samples from what a Python program holds: texts, a data set, or batches of tokens."""

import random
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
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
KINDS = "the name of a task, texts, a datasets.Dataset or batches with input_ids and labels"


class SampleList:
    """Finished samples, in another order on every pass through them."""

    def __init__(self, samples: Sequence[Sample]) -> None:
        """Keep the samples, at least one."""
        self.samples = samples

    def __len__(self) -> int:
        """How many there are."""
        return len(self.samples)

    @property
    def longest(self) -> int:
        """Tokens of the longest sample."""
        return max(len(sample["input_ids"]) for sample in self.samples)

    def sample(self, index: int, seed: int) -> Sample:
        """Sample `index` of an endless run of passes, each in its own order of (seed, pass)."""
        number, position = divmod(index, len(self.samples))
        order = list(range(len(self.samples)))
        random.Random(f"{seed}:{number}").shuffle(order)
        return self.samples[order[position]]


def read_data(data: Any, text_key: str, vocabulary: int) -> list[str] | SampleList:
    """What `duo_id.identify` was given as `data`: texts, or finished samples.

    Args:
        data: texts; a `datasets.Dataset` with the columns `input_ids` and `labels`, or else with one of texts; or
            batches, such as a `DataLoader` gives: mappings with `input_ids` and `labels` (tokens,) or (samples,
            tokens), and perhaps `attention_mask` and `answers`.
        text_key: the column with texts.
        vocabulary: the number of tokens that the model knows.

    Raises:
        UserError: it is none of these, is empty or has no length.
    """
    check(
        not isinstance(data, datasets.IterableDataset | datasets.IterableDatasetDict),
        "data: a data set that streams may have no end: give datasets.Dataset.from_list(list(data.take(1000)))",
    )
    if isinstance(data, datasets.DatasetDict):
        raise UserError(f"data: a DatasetDict holds splits: give one of {', '.join(data)}")
    if isinstance(data, datasets.Dataset):
        columns = set(data.column_names)
        is_tokens = {"input_ids", "labels"} <= columns
        names = ", ".join(data.column_names)
        check(
            is_tokens or text_key in columns,
            f"data: the data set has columns {names}, neither {text_key} nor input_ids and labels",
        )
        data = data.with_format("torch") if is_tokens else data[text_key]
    is_rows = (
        isinstance(data, Iterable) and not isinstance(data, str | bytes | Mapping) and not hasattr(data, "columns")
    )
    check(is_rows, f"data: {type(data).__name__} is not {KINDS}")
    rows = list(islice(data, _length(data)))
    check(bool(rows), "data is empty")
    if isinstance(rows[0], str):
        other = next((row for row in rows if not isinstance(row, str)), "")
        check(isinstance(other, str), f"data: the first row is a text, and another of type {type(other).__name__}")
        return rows
    samples = SampleList([sample for row in rows for sample in _samples(row)])
    largest = max(int(sample["input_ids"].max()) for sample in samples.samples)
    smallest = min(int(sample["input_ids"].min()) for sample in samples.samples)
    check(
        smallest >= 0 and largest < vocabulary,
        f"data: tokens from {smallest} to {largest} are not all in the model's vocabulary of {vocabulary}",
    )
    return samples


def _length(data: Any) -> int:
    """How many rows there are, of what says so."""
    try:
        return len(data)
    except TypeError:  # a DataLoader has a length if what it draws from has one
        raise UserError(
            f"data: a {type(data).__name__} without a length may have no end: give a list of what it holds, such as "
            "list(itertools.islice(data, 1000))"
        ) from None


def text_task(
    texts: Sequence[str], settings: DataSettings, tokenizer: PreTrainedTokenizerBase, length_limit: int | None
) -> Task:
    """Natural text drawn from these texts, as `data=text` draws it from a haystack."""
    sizes = np.array([len(text.encode()) for text in texts], dtype=np.int64)
    haystack = Haystack(texts, sizes, "train", WHOLE, advice="give more texts", name="data: the text")
    return TextTask(settings, tokenizer, "train", length_limit, haystack)


def _samples(batch: Any) -> list[Sample]:
    """The samples of a batch without their padding."""
    is_batch = isinstance(batch, Mapping) and {"input_ids", "labels"} <= batch.keys()
    check(is_batch, f"data: a row is of type {type(batch).__name__}: give {KINDS}")
    ids, labels = _rows("input_ids", batch["input_ids"]), _rows("labels", batch["labels"])
    mask, answers = batch.get("attention_mask"), batch.get("answers")
    real = torch.ones_like(ids) if mask is None else _rows("attention_mask", mask)
    check(
        labels.shape == ids.shape == real.shape,
        f"data: input_ids have the shape {tuple(ids.shape)}, labels {tuple(labels.shape)}, attention_mask "
        f"{tuple(real.shape)}",
    )
    check(
        bool(((labels == ids) | (labels == UNSCORED)).all()),
        f"data: labels must be the input_ids where tokens are scored and {UNSCORED} elsewhere; they are not shifted",
    )
    turns = _answers(answers, ids)
    samples = []
    for row, kept in enumerate(real.bool()):
        own_labels, own_turns = (
            labels[row][kept].clone(),
            (turns if turns is not None else labels != UNSCORED)[row][kept],
        )
        own_labels[:1] = UNSCORED  # nothing stands before the first token that could predict it
        own_turns = own_turns.long().masked_fill(own_labels == UNSCORED, 0)
        check(
            bool((own_labels != UNSCORED).any()),
            f"data: all labels of a sample but the first are {UNSCORED}, so nothing in it can be scored",
        )
        samples.append(Sample(input_ids=ids[row][kept], labels=own_labels, answers=own_turns))
    return samples


def _answers(values: Any, ids: Tensor) -> Tensor | None:
    """Which answer each token belongs to, if that is what the column says."""
    try:
        answers = _rows("answers", values)
    except UserError:
        return None
    return answers if answers.shape == ids.shape else None


def _rows(name: str, values: Any) -> Tensor:
    try:
        rows = torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise UserError(f"data: {name} of a row are not whole numbers, as many in each sample of a batch") from error
    is_whole = not rows.is_floating_point() and not rows.is_complex() and rows.dim() in (1, 2) and rows.numel() > 0
    check(is_whole, f"data: {name} are {rows.dtype} of shape {tuple(rows.shape)}, not whole numbers (samples, tokens)")
    return (rows if rows.dim() == 2 else rows[None]).long().cpu()
