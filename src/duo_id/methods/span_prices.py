"""What a head's next larger span saves: measured from both sides wherever training comes past, and averaged."""

import json
from pathlib import Path
from typing import Annotated, Self

import torch
from pydantic import Field
from torch import Tensor

from duo_id.common.documents import FIRST, Data, Natural, NonNegative, checked, read_json
from duo_id.common.errors import UserError, check
from duo_id.common.files import write_text
from duo_id.common.integrity import sealed

PRICES_FILE = "prices.json"  # in a run folder: the prices so far


class _State(Data):
    """The content of `PRICES_FILE`."""

    levels: list[int]
    shape: Annotated[list[Natural], Field(min_length=4, max_length=4)]  # of what follows
    saved: Annotated[list[float], FIRST]
    weights: Annotated[list[NonNegative], FIRST]
    count: Natural
    seconds: NonNegative


def costs_of(steps: Tensor) -> Tensor:
    """The costs (..., levels), 0 at the last, of what each step (..., levels - 1) to the next larger level saves."""
    rise = steps.flip(-1).cumsum(-1).flip(-1)
    return torch.cat([rise, rise.new_zeros((*rise.shape[:-1], 1))], -1)


class SpanPrices:
    """Estimates of how much the loss rises when a head's span shrinks to the next smaller level.

    Where a head sees level l, the slope towards level l + 1 overestimates what that would save, and where it sees l + 1
    the slope towards l underestimates what it would cost (at full attention it is 0). If the loss is quadratic in
    between, the mean of both is exact.

    Attributes:
        saved: (2, gated layers, KV heads, levels - 1) float64 CPU, sums of prices at each step between two levels:
            of the larger span from below, and of the smaller one from above.
        weights: the same shape, of these sums.
        count: samples so far.
    """

    def __init__(self, costs: Tensor, weight: float = 1.0) -> None:
        """Start from the costs (gated layers, KV heads, levels) of curvature, which count as much as sample `weight`.

        They are quadratic, so that the slope from below is twice the difference, and that from above 0.
        """
        steps = -costs.double().diff(dim=-1)
        self.saved = torch.stack([2 * steps, torch.zeros_like(steps)]) * weight
        self.weights = torch.full_like(self.saved, weight)
        self.count = 0

    def add(self, level: Tensor, rises: Tensor, real: Tensor) -> None:
        """Count the prices of one sample; late ones weigh more, as better estimates have spent their budgets.

        Args:
            level: (gated layers, KV heads) int64, the level that each head saw.
            rises: (2, gated layers, KV heads), the slope of the loss towards the next smaller and next larger level.
            real: (levels - 1,) bool: whether the sample is long enough to tell a level from the next.
        """
        self.count += 1
        rises = rises.double().cpu()
        levels = len(real) + 1
        for side, (step, price) in enumerate([(level, -rises[1]), (level - 1, rises[0])]):
            measured = (step >= 0) & (step < levels - 1)
            measured &= real[step.clamp(0, levels - 2)]
            layer, head = measured.nonzero(as_tuple=True)
            at = (layer, head, step[layer, head])
            self.saved[side][at] += self.count * price[layer, head]
            self.weights[side][at] += self.count

    def costs(self) -> Tensor:
        """(gated layers, KV heads, levels) float64: the rise of the loss at each level, 0 at the last."""
        return costs_of((self.saved / self.weights).mean(0))

    def write(self, path: Path, levels: Tensor, seconds: float) -> None:
        """Save the prices, the levels that they are of, and the time that they have taken."""
        state = {
            "levels": levels.tolist(),
            "shape": list(self.saved.shape),
            "saved": self.saved.flatten().tolist(),
            "weights": self.weights.flatten().tolist(),
            "count": self.count,
            "seconds": seconds,
        }
        write_text(path, json.dumps(sealed(state)))

    @classmethod
    def read(cls, path: Path, levels: Tensor, heads: tuple[int, int]) -> tuple[Self, float]:
        """The saved prices of (layers, KV heads) at these levels, and the time that they have taken.

        Raises:
            UserError: the file is damaged, or of another model or other levels.
        """
        try:
            state = checked(_State, read_json(path), path)
        except UserError as error:
            raise UserError(f"resume: {error}: delete it to start anew") from error
        shape = (2, *heads, len(levels) - 1)
        check(
            tuple(state.shape) == shape and state.levels == levels.tolist(),
            f"resume: {path} prices other heads or spans than this run: delete it to start anew",
        )
        size = 2 * heads[0] * heads[1] * (len(levels) - 1)
        check(
            len(state.saved) == len(state.weights) == size,
            f"resume: {path} does not hold {size} prices: delete it to start anew",
        )
        prices = cls(torch.zeros(*heads, len(levels)))
        prices.saved, prices.weights = (
            torch.tensor(values, dtype=torch.float64).view(shape) for values in (state.saved, state.weights)
        )
        prices.count = state.count
        return prices, state.seconds
