"""Where in a sample the answers stand before they are asked for, found by their tokens."""

import torch
from torch import Tensor

from duo_id.common.errors import UserError
from duo_id.data.samples import Sample


class NoNeedleError(UserError):
    """A sample does not hold its answers."""


def needles(sample: Sample) -> list[tuple[Tensor, Tensor]]:
    """Each answer's positions, and those of the same tokens further up.

    Args:
        sample: whose `answers` name the tokens of each answer.

    Returns:
        for each answer in turn, (n,) where it is given and (n,) its first earlier occurrence.

    Raises:
        NoNeedleError: an answer stands nowhere earlier, or there is none.
    """
    ids, places = sample["input_ids"], sample["answers"]
    found = []
    for turn in range(1, int(places.max()) + 1):
        answer = (places == turn).nonzero()[:, 0]
        windows = ids[: int(answer[0])].unfold(0, len(answer), 1) if int(answer[0]) >= len(answer) else ids[:0, None]
        starts = (windows == ids[answer]).all(-1).nonzero()[:, 0]
        if not len(starts):
            raise NoNeedleError("this method needs samples whose answers stand in their contexts, such as data=passkey")
        found.append((answer, torch.arange(len(answer)) + starts[0]))
    if not found:
        raise NoNeedleError("this method needs samples with answers, such as data=passkey")
    return found
