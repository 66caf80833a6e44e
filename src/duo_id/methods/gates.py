"""The trained gates: parametrisations of alpha, one small class each."""

import math
import random
from collections.abc import Sequence

import torch
from torch import Tensor, nn

BETA, GAMMA, ZETA = 2 / 3, -0.1, 1.1  # of the hard concrete distribution, as its authors chose them
GOLDEN = (math.sqrt(5) - 1) / 2  # multiples of it, less their whole part, cover [0, 1) evenly from the first one on
APART = math.sqrt(2)  # how far apart seeds begin: no sum of a whole number and a multiple of GOLDEN
JITTER = 1e-3  # of the weights of nested gates, which are all equal at first
TINY = 1e-30  # below what the slopes of any gates that still move add up to


class Gates(nn.Module):
    """What all parametrisations have: a float32 weight a gate, and the mean over training of how open it was.

    Float32 whatever the model computes in: bfloat16 has a grid of 1/256 above 0.5, on which late updates vanish.

    Attributes:
        COURSE: the weight in a gate's score of how open it was over training, beside how open it is.
        LATE: how much more late steps count in that: step t about as t to this power.
        BLENDS: whether how open a gate is says how much full attention its head is given.
    """

    COURSE = 1e-2
    LATE = 0
    BLENDS = True

    def __init__(
        self,
        layers: int,
        kv_heads: int,
        initial: float = 1.0,
        temperature: float = 1.0,
        seed: int = 0,
        budgets: Sequence[float] = (0.4, 0.97),
    ) -> None:
        """Make the gates.

        Args:
            layers: how many have gates.
            kv_heads: of a layer.
            initial: how open all gates are at first, in [0, 1].
            temperature: of the gates that have one.
            seed: of the gates that are drawn.
            budgets: of nested gates: the sparsities between which masks are drawn.
        """
        super().__init__()
        self.temperature, self.seed, self.budgets = temperature, seed, budgets
        self.weight = nn.Parameter(torch.full((layers, kv_heads), self.weight_of(initial), dtype=torch.float32))
        self.mean: Tensor
        self.steps: Tensor
        self.register_buffer("mean", torch.full((layers, kv_heads), initial, dtype=torch.float32))
        self.register_buffer("steps", torch.zeros(()))

    def weight_of(self, openness: float) -> float:
        """The weight at which a gate is this open."""
        return openness

    def openness(self) -> Tensor:
        """(layers, KV heads) float32 in [0, 1], with a gradient: what penalties look at; 1 = full attention."""
        return self.weight

    def alpha(self) -> Tensor:
        """(layers, KV heads) float32 in [0, 1]: what heads are blended with; while training, perhaps drawn."""
        return self.openness()

    @torch.no_grad()
    def project_(self) -> None:
        """Called after each optimizer step: bring the weight back to where it means a gate, and note how open it is."""
        self.bound_()
        self.steps += 1
        self.mean += (self.openness() - self.mean) * ((self.LATE + 1) / (self.LATE + self.steps))

    def bound_(self) -> None:
        """Bring the weight back to where it means a gate."""

    @torch.no_grad()
    def scores(self) -> Tensor:
        """(layers, KV heads) in [0, 1]: how open the gates are, and among equals how open they were over training.

        Gates that are clamped, or saturate, tie at 0 and 1; a mask's budget must not be settled by chance there.
        """
        return (1 - self.COURSE) * self.openness() + self.COURSE * self.mean


class ClampedGates(Gates):
    """Alpha is the weight itself, projected to [0, 1] in place between optimizer steps (DuoAttention, section 2.2)."""

    def bound_(self) -> None:
        """Clamp."""
        self.weight.clamp_(0, 1)


class SigmoidGates(Gates):
    """Alpha is the sigmoid of the weight over a temperature: the lower it is, the sooner gates are 0 or 1."""

    def weight_of(self, openness: float) -> float:
        """The inverse; gates do not begin nearer to 0 or 1 than 0.01, where they would hardly move."""
        return self.temperature * _logit(openness)

    def openness(self) -> Tensor:
        """The sigmoid."""
        return torch.sigmoid(self.weight / self.temperature)


class DrawnGates(Gates):
    """Gates that are drawn at every training step.

    What is drawn is a function of a seed and the number of draws so far, which checkpoints hold: a resumed run draws
    what an undisturbed one would.
    """

    draws = 0

    def uniform(self) -> Tensor:
        """(layers, KV heads) uniform noise in (0, 1), other at every call."""
        drawn = random.Random(f"{self.seed}:{self.draws}").getrandbits(32)  # all that CPU generators take of a seed
        generator = torch.Generator().manual_seed(drawn)
        self.draws += 1
        noise = torch.rand(self.weight.shape, generator=generator)
        return noise.clamp(1e-6, 1 - 1e-6).to(self.weight.device, non_blocking=True)

    def get_extra_state(self) -> dict[str, int]:
        """What a checkpoint holds beside tensors."""
        return {"draws": self.draws}

    def set_extra_state(self, state: dict[str, int]) -> None:
        """Go on from a checkpoint."""
        self.draws = int(state["draws"])


class HardConcreteGates(DrawnGates):
    """The stretched and clamped concrete distribution (Louizos et al. 2018, arXiv 1712.01312), as in PruLong.

    Source: PruLong is Bhaskar et al. 2025, arXiv 2506.17121.
    """

    def weight_of(self, openness: float) -> float:
        """Where the probability of being open is this."""
        return _logit(openness) + BETA * math.log(-GAMMA / ZETA)

    def openness(self) -> Tensor:
        """The probability that a gate is not 0."""
        return torch.sigmoid(self.weight - BETA * math.log(-GAMMA / ZETA))

    def alpha(self) -> Tensor:
        """Drawn while training; afterwards without noise."""
        if not self.training:
            return self._stretched(torch.sigmoid(self.weight))
        noise = self.uniform()
        return self._stretched(torch.sigmoid((noise.log() - (-noise).log1p() + self.weight) / BETA))

    @staticmethod
    def _stretched(concrete: Tensor) -> Tensor:
        return (concrete * (ZETA - GAMMA) + GAMMA).clamp(0, 1)


class StraightThroughGates(DrawnGates):
    """Alpha is 0 or 1, drawn with the weight as probability, whose gradient passes as if it were the weight.

    Source: Bengio et al. 2013, arXiv 1308.3432, section 4. Outside training it is 1 from a half on.
    """

    def bound_(self) -> None:
        """Clamp: the weight is a probability."""
        self.weight.clamp_(0, 1)

    def alpha(self) -> Tensor:
        """0 or 1."""
        threshold = self.uniform() if self.training else torch.full_like(self.weight, 0.5)
        return (self.weight >= threshold).float() + (self.weight - self.weight.detach())  # exactly 0 or 1


class NestedGates(DrawnGates):
    """Hard masks of one order, each of a budget drawn anew: what is trained is which head comes next at any sparsity.

    Alpha is 1 for the heads with the largest weights, as many as the budget has, but one at least, and 0 for the
    others. Its gradient is that of a sigmoid of the weight's distance from the mask's threshold, over the temperature,
    where the threshold moves with the weights such that the budget stays: heads compete for places, and no penalty is
    needed.
    Outside training the budget is the middle one. Heads between which no budget decides clearly change places until
    the end, so scores are means over the last third or so of the training, which costs nothing and settles them
    (polynomial-decay averaging: Shamir and Zhang 2013, arXiv 1212.1824).

    Source: the gradient is straight-through (Bengio et al. 2013, arXiv 1308.3432) of a relaxed choice of k
    (Xie and Ermon 2019, arXiv 1901.10517); budgets drawn in training are those of slimmable networks (Yu et al. 2019,
    arXiv 1812.08928).
    """

    COURSE = 1.0
    LATE = 3
    BLENDS = False

    def weight_of(self, openness: float) -> float:
        """As of sigmoid gates at temperature 1."""
        return _logit(openness)

    def openness(self) -> Tensor:
        """The sigmoid of the weight: the order of the heads in (0, 1), and not how many of them are open."""
        return torch.sigmoid(self.weight)

    def alpha(self) -> Tensor:
        """0 or 1."""
        place, order = 0.5, self.weight.detach()
        if self.training:
            place = (self.seed * APART + self.draws * GOLDEN) % 1
            order = order + JITTER * self.uniform()
        sparsity = self.budgets[0] + place * (self.budgets[1] - self.budgets[0])
        heads = order.numel()
        kept = max(heads - round(sparsity * heads), 1)
        ranked = order.flatten().sort(descending=True)
        mask = torch.zeros_like(ranked.values).scatter_(0, ranked.indices[:kept], 1.0).view_as(order)
        threshold = ranked.values[kept - 1 : kept + 1].mean()
        near = torch.sigmoid((order - threshold) / self.temperature)
        slope = near * (1 - near) / self.temperature
        moved = self.weight - self.weight.detach()  # 0, with a gradient
        return mask + slope * (moved - (slope * moved).sum() / slope.sum().clamp(min=TINY))


def _logit(openness: float) -> float:
    inside = min(max(openness, 0.01), 0.99)
    return math.log(inside / (1 - inside))


GATES: dict[str, type[Gates]] = {
    "clamp": ClampedGates,
    "sigmoid": SigmoidGates,
    "hard_concrete": HardConcreteGates,
    "straight_through": StraightThroughGates,
    "nested": NestedGates,
}
