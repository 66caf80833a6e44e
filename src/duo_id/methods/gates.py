"""Parametrisations of the trained gates (alpha), one small class each."""

import math
import random
from collections.abc import Sequence

import torch
from torch import Tensor, nn

BETA, GAMMA, ZETA = 2 / 3, -0.1, 1.1  # of the hard concrete distribution, as its authors chose them
GOLDEN = (math.sqrt(5) - 1) / 2  # the fractional parts of its multiples cover [0, 1) evenly, however many are taken
SEED_OFFSET = math.sqrt(2)  # no whole number plus a multiple of GOLDEN, so the sequences of two seeds never meet
JITTER = 1e-3  # breaks ties of nested gates, which all start equal
TINY = 1e-30  # below the sum of slopes of any gates that still move


class Gates(nn.Module):
    """Base class: one float32 weight per gate, and the mean of its openness over training.

    Float32 whatever the model's dtype: bfloat16 has a grid of 1/256 above 0.5, where late updates would vanish.

    Attributes:
        MEAN_WEIGHT: weight of the mean openness in a gate's score; the rest is the current openness.
        LATE_POWER: weights late steps in that mean: step t counts about as t to this power.
        OPENNESS_IS_SHARE: whether openness is the share of full attention that the head gets.
    """

    MEAN_WEIGHT = 1e-2
    LATE_POWER = 0
    OPENNESS_IS_SHARE = True

    def __init__(
        self,
        layers: int,
        kv_heads: int,
        initial: float = 1.0,
        temperature: float = 1.0,
        seed: int = 0,
        budgets: Sequence[float] = (0.4, 0.97),
    ) -> None:
        """Initialise all gates alike.

        Args:
            layers: number of gated layers.
            kv_heads: per layer.
            initial: openness of all gates at first, in [0, 1].
            temperature: of sigmoid and nested gates.
            seed: of drawn gates.
            budgets: of nested gates: the range of sparsities from which masks are drawn.
        """
        super().__init__()
        self.temperature, self.seed, self.budgets = temperature, seed, budgets
        self.weight = nn.Parameter(torch.full((layers, kv_heads), self.weight_of(initial), dtype=torch.float32))
        self.mean: Tensor
        self.steps: Tensor
        self.register_buffer("mean", torch.full((layers, kv_heads), initial, dtype=torch.float32))
        self.register_buffer("steps", torch.zeros(()))

    def weight_of(self, openness: float) -> float:
        """The weight of a gate of this openness."""
        return openness

    def openness(self) -> Tensor:
        """(layers, KV heads) float32 in [0, 1], with a gradient, for penalties; 1 = full attention."""
        return self.weight

    def alpha(self) -> Tensor:
        """(layers, KV heads) float32 in [0, 1], the blend of each head; some gates draw it while training."""
        return self.openness()

    @torch.no_grad()
    def project_(self) -> None:
        """Project the weights to valid gates and update the mean openness; called after each optimizer step."""
        self.bound_()
        self.steps += 1
        self.mean += (self.openness() - self.mean) * ((self.LATE_POWER + 1) / (self.LATE_POWER + self.steps))

    def bound_(self) -> None:
        """Project the weights to valid gates, in place."""

    @torch.no_grad()
    def scores(self) -> Tensor:
        """(layers, KV heads) in [0, 1]: the openness, with ties broken by its mean over training.

        Clamped and saturated gates tie at 0 and 1; chance must not decide which of them a mask keeps.
        """
        return (1 - self.MEAN_WEIGHT) * self.openness() + self.MEAN_WEIGHT * self.mean


class ClampedGates(Gates):
    """Alpha is the weight itself, clamped to [0, 1] after each optimizer step (DuoAttention, section 2.2)."""

    def bound_(self) -> None:
        """Clamp."""
        self.weight.clamp_(0, 1)


class SigmoidGates(Gates):
    """Alpha is the sigmoid of the weight over a temperature: the lower, the sooner gates reach 0 or 1."""

    def weight_of(self, openness: float) -> float:
        """The inverse of the sigmoid, at least 0.01 away from 0 and 1, where gates would hardly move."""
        return self.temperature * _logit(openness)

    def openness(self) -> Tensor:
        """The sigmoid."""
        return torch.sigmoid(self.weight / self.temperature)


class DrawnGates(Gates):
    """Gates that are drawn at every training step.

    A draw is a function of the seed and of the number of draws so far, which checkpoints hold: a resumed run draws
    what an uninterrupted one would.
    """

    draws = 0

    def uniform(self) -> Tensor:
        """(layers, KV heads) uniform noise in (0, 1), different on every call."""
        seed = random.Random(f"{self.seed}:{self.draws}").getrandbits(32)  # CPU generators use 32 bits of a seed
        generator = torch.Generator().manual_seed(seed)
        self.draws += 1
        noise = torch.rand(self.weight.shape, generator=generator)
        return noise.clamp(1e-6, 1 - 1e-6).to(self.weight.device, non_blocking=True)

    def get_extra_state(self) -> dict[str, int]:
        """The number of draws, for the checkpoint."""
        return {"draws": self.draws}

    def set_extra_state(self, state: dict[str, int]) -> None:
        """Restore the number of draws from a checkpoint."""
        self.draws = int(state["draws"])


class HardConcreteGates(DrawnGates):
    """The stretched and clamped concrete distribution (Louizos et al. 2018, arXiv 1712.01312).

    As in PruLong (Bhaskar et al. 2025, arXiv 2506.17121).
    """

    def weight_of(self, openness: float) -> float:
        """The weight at which the gate is nonzero with this probability."""
        return _logit(openness) + BETA * math.log(-GAMMA / ZETA)

    def openness(self) -> Tensor:
        """The probability that a gate is not 0."""
        return torch.sigmoid(self.weight - BETA * math.log(-GAMMA / ZETA))

    def alpha(self) -> Tensor:
        """Drawn while training, noiseless otherwise."""
        if not self.training:
            return self._stretched(torch.sigmoid(self.weight))
        noise = self.uniform()
        return self._stretched(torch.sigmoid((noise.log() - (-noise).log1p() + self.weight) / BETA))

    @staticmethod
    def _stretched(concrete: Tensor) -> Tensor:
        return (concrete * (ZETA - GAMMA) + GAMMA).clamp(0, 1)


class StraightThroughGates(DrawnGates):
    """Alpha is 0 or 1, drawn with the weight as probability; its gradient is passed straight to the weight.

    Outside training it is 1 for weights from 0.5 on. Source: Bengio et al. 2013, arXiv 1308.3432, section 4.
    """

    def bound_(self) -> None:
        """Clamp: the weight is a probability."""
        self.weight.clamp_(0, 1)

    def alpha(self) -> Tensor:
        """0 or 1."""
        threshold = self.uniform() if self.training else torch.full_like(self.weight, 0.5)
        return (self.weight >= threshold).float() + (self.weight - self.weight.detach())  # exactly 0 or 1


class NestedGates(DrawnGates):
    """Hard masks from one order of the heads, each at a budget drawn anew: trains the order at all sparsities at once.

    Alpha is 1 for the heads with the largest weights, as many as the budget allows but at least one, and 0 for the
    others. Its gradient is that of a sigmoid of the weight's distance from the mask's threshold, over the temperature,
    where the threshold moves with the weights so that the budget holds: heads compete, and no penalty is needed.
    Outside training the budget is the middle of the range. Heads that no budget clearly separates keep swapping ranks
    until the end, so scores are means over roughly the last third of training (polynomial-decay averaging: Shamir and
    Zhang 2013, arXiv 1212.1824).

    Source: the gradient is straight-through (Bengio et al. 2013, arXiv 1308.3432) of a relaxed choice of k
    (Xie and Ermon 2019, arXiv 1901.10517); budgets drawn in training are those of slimmable networks (Yu et al. 2019,
    arXiv 1812.08928).
    """

    MEAN_WEIGHT = 1.0
    LATE_POWER = 3
    OPENNESS_IS_SHARE = False

    def weight_of(self, openness: float) -> float:
        """As for sigmoid gates at temperature 1."""
        return _logit(openness)

    def openness(self) -> Tensor:
        """The sigmoid of the weight: it orders the heads in (0, 1) but does not say how many are open."""
        return torch.sigmoid(self.weight)

    def alpha(self) -> Tensor:
        """0 or 1."""
        fraction, order = 0.5, self.weight.detach()
        if self.training:
            fraction = (self.seed * SEED_OFFSET + self.draws * GOLDEN) % 1
            order = order + JITTER * self.uniform()
        sparsity = self.budgets[0] + fraction * (self.budgets[1] - self.budgets[0])
        heads = order.numel()
        kept = max(heads - round(sparsity * heads), 1)
        ranked = order.flatten().sort(descending=True)
        mask = torch.zeros_like(ranked.values).scatter_(0, ranked.indices[:kept], 1.0).view_as(order)
        threshold = ranked.values[kept - 1 : kept + 1].mean()
        closeness = torch.sigmoid((order - threshold) / self.temperature)
        slope = closeness * (1 - closeness) / self.temperature
        zero = self.weight - self.weight.detach()  # 0, with a gradient
        return mask + slope * (zero - (slope * zero).sum() / slope.sum().clamp(min=TINY))


def _logit(openness: float) -> float:
    clamped = min(max(openness, 0.01), 0.99)
    return math.log(clamped / (1 - clamped))


GATES: dict[str, type[Gates]] = {
    "clamp": ClampedGates,
    "sigmoid": SigmoidGates,
    "hard_concrete": HardConcreteGates,
    "straight_through": StraightThroughGates,
    "nested": NestedGates,
}
