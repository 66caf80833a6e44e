"""Needles: where a sample's answers occur in its context, located by their tokens."""

import torch
from torch import Tensor

from duo_id.common.errors import UserError
from duo_id.data.samples import Sample


class NoNeedleError(UserError):
    """A sample's answers do not occur in its context."""


def needles(sample: Sample) -> list[tuple[Tensor, Tensor]]:
    """The positions of each answer and of its first occurrence in the context.

    Args:
        sample: whose `answers` number the tokens of each answer.

    Returns:
        for each answer in turn, (n,) its own positions and (n,) those of its first earlier occurrence.

    Raises:
        NoNeedleError: an answer has no earlier occurrence, or there are no answers.
    """
    ids, turns = sample["input_ids"], sample["answers"]
    spans = []
    for number in range(1, int(turns.max()) + 1):
        answer = (turns == number).nonzero()[:, 0]
        windows = ids[: int(answer[0])].unfold(0, len(answer), 1) if int(answer[0]) >= len(answer) else ids[:0, None]
        starts = (windows == ids[answer]).all(-1).nonzero()[:, 0]
        if not len(starts):
            raise NoNeedleError("this method needs samples whose answers occur in their contexts, such as data=passkey")
        spans.append((answer, torch.arange(len(answer)) + starts[0]))
    if not spans:
        raise NoNeedleError("this method needs samples with answers, such as data=passkey")
    return spans
