"""Samples, the tasks that make them, and how they become a batch."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, TypedDict

import torch
from torch import Tensor
from torch.nn.functional import pad

from duo_id.distributed.ranks import Ranks

SPLITS = ("train", "validation", "test")
UNSCORED = -100  # the label of tokens without loss


class Sample(TypedDict):
    """One text with questions and answers: int64 tensors, all (tokens,).

    Labels and answers are aligned with their own tokens: shift by one to compare them with logits.
    """

    input_ids: Tensor
    labels: Tensor  # the token itself if it is scored, else -100
    answers: Tensor  # k at the tokens of the k-th answer, k from 1, else 0


class Batch(TypedDict):
    """Samples padded to the longest one: (samples, tokens)."""

    input_ids: Tensor
    labels: Tensor
    answers: Tensor
    attention_mask: Tensor | None  # bool, True = real; None: no padding


class Task(Protocol):
    """An object that makes samples."""

    def sample(self, index: int, seed: int) -> Sample:
        """The sample of this (seed, split, index): the same in every process and on every machine."""
        ...


def collate(samples: Sequence[Sample], pad_id: int, padding_side: str) -> Batch:
    """Pad samples to the longest one, on the `right` or `left`: `pad_id` for tokens, -100 for labels, 0 for answers."""
    lengths = [len(sample["input_ids"]) for sample in samples]
    longest = max(lengths)

    def stack(rows: list[Tensor], value: int | bool) -> Tensor:
        gaps = [longest - len(row) for row in rows]
        return torch.stack(
            [
                pad(row, (gap, 0) if padding_side == "left" else (0, gap), value=value)
                for row, gap in zip(rows, gaps, strict=True)
            ]
        )

    real = [torch.ones(length, dtype=torch.bool) for length in lengths]
    return Batch(
        input_ids=stack([sample["input_ids"] for sample in samples], pad_id),
        labels=stack([sample["labels"] for sample in samples], UNSCORED),
        answers=stack([sample["answers"] for sample in samples], 0),
        attention_mask=stack(real, False) if min(lengths) < longest else None,
    )


def pad_batch(batch: Batch, multiple: int, limit: int) -> Batch:
    """Pad a batch on the right to a multiple of `multiple` tokens (at most `limit`), so that there are few lengths.

    Causal attention never sees later tokens, so real tokens are unaffected and this padding needs no mask.
    """
    tokens = batch["input_ids"].shape[1]
    gap = max(min(-(-tokens // multiple) * multiple, limit) - tokens, 0)
    mask = batch["attention_mask"]
    return Batch(
        input_ids=pad(batch["input_ids"], (0, gap)),
        labels=pad(batch["labels"], (0, gap), value=UNSCORED),
        answers=pad(batch["answers"], (0, gap)),
        attention_mask=None if mask is None else pad(mask, (0, gap)),
    )


def split_batch(batch: Mapping[str, Any], part: int, parts: int) -> dict[str, Any]:
    """One of `parts` equally long spans of a batch's tokens, with their positions.

    Real tokens come first and padding to a multiple of `parts` last, where causal attention never looks.

    Args:
        batch: whole samples; labels and answers are optional.
        part: index of the span, from 0.
        parts: number of spans.

    Returns:
        the span, and of a single labelled sample without padding `all_scored`: (n,) positions of its labelled tokens.
    """
    samples, tokens = batch["input_ids"].shape
    length = -(-tokens // parts)
    mask = batch.get("attention_mask")
    start = torch.zeros(samples, dtype=torch.int64) if mask is None else mask.to(torch.int32).argmax(-1)
    positions = torch.arange(part * length, (part + 1) * length).expand(samples, -1)
    order = (positions + start[:, None]) % tokens

    def span(rows: Tensor, value: int) -> Tensor:
        return rows.gather(1, order.to(rows.device)).masked_fill((positions >= tokens).to(rows.device), value)

    fill = {"input_ids": 0, "labels": UNSCORED, "answers": 0}
    result = {key: span(batch[key], value) for key, value in fill.items() if key in batch}
    if samples == 1 and mask is None and "labels" in batch:
        result["all_scored"] = (batch["labels"][0] != UNSCORED).nonzero()[:, 0]
    return result | {
        "attention_mask": None,
        "position_ids": positions.clamp(max=tokens - 1).to(result["input_ids"].device),
    }


def with_scored(batch: Mapping[str, Any], least: int = 0) -> dict[str, Any]:
    """Add `scored`, flat indices of the labelled tokens, and `weights`, which turn a sum over them into a mean.

    With `least`, their number is padded, with weight 0, to the next of few numbers: a multiple of `least`, and of a
    quarter of the power of 2 below it.
    """
    scored = (batch["labels"].flatten() != UNSCORED).nonzero()[:, 0]
    size = least
    while 0 < size < len(scored):
        size += max(least, 2 ** (size.bit_length() - 1) // 4)
    gap = max(size - len(scored), 0)
    weights = torch.full((len(scored),), 1 / max(len(scored), 1))
    return {**batch, "scored": pad(scored, (0, gap)), "weights": pad(weights, (0, gap))}


def batch_of_one(sample: Sample, device: torch.device) -> dict[str, Any]:
    """One sample as a batch on a device, with what `with_scored` adds."""
    batch = with_scored(collate([sample], 0, "right"))
    return {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}


def shared_weights(weights: Tensor, ranks: Ranks) -> Tensor:
    """Weights under which every scored token of all ranks counts the same in the mean of the ranks' losses.

    Args:
        weights: as of `with_scored`, one for each scored token of this rank.
        ranks: the processes that share the step.
    """
    if ranks.world == 1:
        return weights
    return torch.ones_like(weights) / ranks.mean(weights.new_tensor(len(weights)))
