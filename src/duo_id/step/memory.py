"""What a training step keeps for its backward pass: as much as the memory holds, chosen before anything is computed.

What a step costs grows with its tokens; `duo_id.step.measured_costs` and `duo_id.step.devices` say how.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from math import ceil, floor, inf, log10

import torch
import torch.nn.functional as F
from torch import Tensor

from duo_id.common.errors import UserError
from duo_id.step.budget import memory_bytes
from duo_id.step.chunks import ELEMENT_BYTES, ELEMENTS
from duo_id.step.recompute import Keep, Recomputation

LIBRARIES = 2**30  # bytes that a GPU's libraries and the gaps between tensors take
SPARED = 0.06  # of a GPU's budget: by so much steps have come out above what was counted (docs/performance.md)
GIB = 2**30
KEPT = {
    Keep.ALL: "everything",
    Keep.ATTENTION: "their attention",
    Keep.OUTPUT: "their input and full attention's output",
    Keep.INPUT: "their input",
}


@dataclass(frozen=True)
class Plan:
    """What each layer keeps in a step, and the bytes of a device that this comes to.

    Attributes:
        levels: of each layer.
        tokens: that the device computes, of all its samples together.
        weights: bytes.
        activations: bytes kept for the backward pass, the teacher's outputs among them.
        buffers: bytes that come and go: a layer that is computed again, with its gradients; libraries.
        budget: bytes that there are; None: there is no limit.
        spared: the fraction of the budget that is left free.
    """

    levels: tuple[Keep, ...]
    tokens: int
    weights: int
    activations: int
    buffers: int
    budget: int | None = None
    spared: float = 0.0

    @property
    def total(self) -> int:
        """All of it, in bytes."""
        return self.weights + self.activations + self.buffers

    @property
    def fits(self) -> bool:
        """Whether the budget suffices."""
        return self.budget is None or self.total <= (1 - self.spared) * self.budget

    @property
    def room(self) -> float:
        """Bytes of the budget that are not needed."""
        return inf if self.budget is None else max((1 - self.spared) * self.budget - self.total, 0)

    def check(self) -> None:
        """Raise a `UserError` unless it fits."""
        if not self.fits:
            assert self.budget is not None
            needed, there = _rounded_up(self.total / (1 - self.spared) / GIB), self.budget / GIB
            raise UserError(
                f"step.memory: a step of {self.tokens:,} tokens needs at least {needed:.3g} GiB of its device "
                f"({self._parts()}), and there are {there:.3g}: raise step.memory, lower data.length_max (of the "
                "benchmark context), or let more trainer.devices share it"
            )

    def __str__(self) -> str:
        limit = "" if self.budget is None else f" of {self.budget / GIB:.3g}"
        counts = ", ".join(f"{self.levels.count(level)} {kept}" for level, kept in KEPT.items())
        return (
            f"memory of a device with {self.tokens:,} tokens: {self._parts()} = {self.total / GIB:.3g}{limit} GiB; "
            f"of {len(self.levels)} layers keep {counts}"
        )

    def _parts(self) -> str:
        return " + ".join(f"{key} {getattr(self, key) / GIB:.3g}" for key in ("weights", "activations", "buffers"))


@dataclass(frozen=True)
class Costs:
    """What a model's step needs of a device.

    Attributes:
        weights: bytes of parameters and buffers.
        kept: for each layer, bytes a token that it keeps, by the levels of `Keep` at which it is known.
        other: bytes a token that are kept outside the layers, the teacher's recorded outputs among them.
        passing: bytes a token that come and go in the layer at work, its gradients and what it exchanges with other
            devices; None: as many as a layer keeps at most.
        logits: bytes a token of the objective while it computes logits, which it does in chunks.
        reserve: bytes for libraries; where there are any, a part of the budget is spared.
    """

    weights: int
    kept: Sequence[Mapping[Keep, float]]
    other: float
    passing: float | None = None
    logits: float = 0.0
    reserve: int = 0

    def plan_for(self, levels: Sequence[Keep], tokens: int, budget: int | None) -> Plan:
        """The plan in which layers keep these levels, whether it fits into `budget` bytes or not."""
        activations = tokens * (self.other + sum(row[level] for row, level in zip(self.kept, levels, strict=True)))
        kept = max(row[Keep.ALL] for row in self.kept)
        layer = tokens * (kept + (kept if self.passing is None else self.passing))
        logits = min(tokens * self.logits, ELEMENTS * ELEMENT_BYTES)  # gone before the backward pass
        buffers = max(layer, logits) + self.reserve
        spared = SPARED * (self.reserve > 0)
        return Plan(tuple(levels), tokens, self.weights, int(activations), int(buffers), budget, spared)


@dataclass(frozen=True, kw_only=True)
class MeasuredCosts(Costs):
    """Costs by which layers can choose what they keep.

    Attributes:
        again: for each layer, floating-point operations to compute again at each level, of a given number of tokens.
    """

    again: Callable[[int], Sequence[Sequence[float]]]

    def plan(self, tokens: int, budget: int | None) -> Plan:
        """The levels that fit into `budget` bytes with the fewest operations to do again; None: everything is kept.

        Early layers keep the least: the backward pass comes to them last, when the later ones have freed theirs.

        Raises:
            UserError: not even the least fits.
        """
        layers = len(self.kept)
        smallest = self.plan_for([Keep.INPUT] * layers, tokens, budget)
        smallest.check()
        room = inf if budget is None else (1 - smallest.spared) * budget - smallest.total
        # All ways to cut the layers into runs of one level: two levels alone leave up to a sixth more to do again.
        ends = torch.combinations(torch.arange(layers + 1), len(Keep) - 1, with_replacement=True)
        more = tokens * _sums_of_runs([[row[level] - row[Keep.INPUT] for level in Keep] for row in self.kept], ends)
        work = _sums_of_runs(self.again(tokens), ends)
        work[more > room] = inf
        more[work > work.min()] = inf
        best = (more == more.min()).nonzero()[-1, 0]  # of equals the one in which most layers keep their input
        runs = zip(reversed(Keep), pairwise([0, *ends[best].tolist(), layers]), strict=True)
        levels = [level for level, (start, end) in runs for _ in range(start, end)]
        return self.plan_for(levels, tokens, budget)


def _rounded_up(number: float) -> float:
    """A positive number of three digits that is not smaller, so that asking for it suffices."""
    unit = 10.0 ** (floor(log10(number)) - 2)
    return ceil(number / unit) * unit


def _sums_of_runs(table: Sequence[Sequence[float]], ends: Tensor) -> Tensor:
    """What layers come to if the first ones do as the last column says, the next ones as the one before it, and so on.

    Args:
        table: (layers, n), a layer's value at each of n levels.
        ends: (..., n - 1), the layers at which all runs but the last end.

    Returns:
        (...) float64.
    """
    sums = F.pad(torch.tensor(table, dtype=torch.float64).cumsum(0), (0, 0, 1, 0))
    return sums[-1, 0] + sums.diff(dim=1).flip(1).gather(0, ends).sum(-1)


class MemoryPlanner:
    """Sets what layers keep, by the number of tokens of each step."""

    def __init__(self, recomputation: Recomputation, costs: MeasuredCosts, budget: int | None) -> None:
        """Take what is planned for: the layers, what they cost, and the bytes that there are (None: no limit)."""
        self.recomputation, self.plan = recomputation, lru_cache(maxsize=None)(lambda n: costs.plan(n, budget))

    def apply_plan(self, tokens: int) -> Plan:
        """Let the layers keep what the plan for a step of `tokens` tokens says."""
        plan = self.plan(tokens)
        self.recomputation.levels[:] = plan.levels
        return plan


def available(memory: str, device: torch.device) -> int | None:
    """The bytes of a device that a step may use, weights included; None where nothing limits it.

    Raises:
        UserError: `memory` is neither auto, outputs, least nor a budget.
    """
    budget = memory_bytes(memory)
    if budget is not None or device.type != "cuda":
        return budget
    return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)


def libraries(device: torch.device) -> int:
    """The bytes of a device that are no tensors."""
    return LIBRARIES if device.type == "cuda" else 0
