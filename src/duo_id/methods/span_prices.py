"""What a head's next larger span saves: measured from both sides wherever training comes past, and averaged."""

import torch
from torch import Tensor

LATE_POWER = (
    1  # weights late samples, whose budgets were allocated by better estimates: sample t counts t to this power
)


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
        """Count the prices of one sample.

        Args:
            level: (gated layers, KV heads) int64, the level that each head saw.
            rises: (2, gated layers, KV heads), the slope of the loss towards the next smaller and next larger level.
            real: (levels - 1,) bool: whether the sample is long enough to tell a level from the next.
        """
        self.count += 1
        weight = float(self.count**LATE_POWER)
        rises = rises.double().cpu()
        levels = len(real) + 1
        for side, (step, price) in enumerate([(level, -rises[1]), (level - 1, rises[0])]):
            measured = (step >= 0) & (step < levels - 1)
            measured &= real[step.clamp(0, levels - 2)]
            layer, head = measured.nonzero(as_tuple=True)
            at = (layer, head, step[layer, head])
            self.saved[side][at] += weight * price[layer, head]
            self.weights[side][at] += weight

    def costs(self) -> Tensor:
        """(gated layers, KV heads, levels) float64: the rise of the loss at each level, 0 at the last."""
        steps = (self.saved / self.weights).mean(0)
        rise = steps.flip(-1).cumsum(-1).flip(-1)
        return torch.cat([rise, rise.new_zeros((*rise.shape[:-1], 1))], -1)
