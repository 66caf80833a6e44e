"""How much each head needs each attention span, as far as that was measured or estimated."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import pairwise
from numbers import Integral
from typing import Protocol

import torch
from torch import Tensor

from duo_id.common.documents import MOST_TOKENS, excerpt
from duo_id.common.errors import UserError, check
from duo_id.patterns.fields import ALL, numbers


@dataclass(frozen=True, eq=False)
class SpanNeeds:
    """What the model loses when a single head sees less.

    Attributes:
        levels: attention spans in tokens, ascending, at least one; then -1, the whole context.
        costs: float32 CPU tensor (layers, KV heads, levels), copied at construction: the estimated rise of the loss, in
            any unit that the heads share, when a head sees only that span beside the sink; 0 at the last level. Noise
            may make a longer span cost more than a shorter one, or less than nothing.
    """

    levels: tuple[int, ...]
    costs: Tensor

    def __post_init__(self) -> None:
        """Copy the costs and check all fields."""
        check(isinstance(self.levels, Iterable), f"levels={excerpt(self.levels)} must be attention spans in tokens")
        levels = list(self.levels)
        whole = all(isinstance(span, Integral) and not isinstance(span, bool) for span in levels)
        spans = levels[:-1]
        if (
            not whole
            or not spans
            or levels[-1] != ALL
            or not all(low < high for low, high in pairwise([0, *spans, MOST_TOKENS + 1]))
        ):
            raise UserError(
                f"levels={levels!s:.60} must be attention spans of 1 to {MOST_TOKENS} tokens in ascending order, at "
                "least one, then -1 for the whole context"
            )
        costs = numbers("costs", self.costs, "(layers, KV heads, levels)").detach().to("cpu", torch.float32, copy=True)
        check(
            costs.dim() == 3 and costs.numel() > 0 and costs.shape[2] == len(levels),
            f"costs must have the shape (layers, KV heads, {len(levels)} levels), not {tuple(costs.shape)}",
        )
        wrong = ~costs.isfinite()
        wrong[..., -1] |= costs[..., -1] != 0
        if wrong.any():
            layer, head, level = wrong.nonzero()[0].tolist()
            what = "finite" if level < len(spans) else "0, since it then sees the whole context"
            raise UserError(
                f"the cost of layer {layer}, KV head {head} at span {levels[level]} is "
                f"{costs[layer, head, level].item()}: it must be {what}"
            )
        object.__setattr__(self, "levels", tuple(map(int, levels)))
        object.__setattr__(self, "costs", costs)

    def of_heads(self, shape: tuple[int, ...], gated_layers: tuple[int, ...]) -> "SpanNeeds":
        """The needs of a pattern's heads: as they are in gated layers, 0 in the others.

        Raises:
            UserError: they are not of this shape (layers, KV heads).
        """
        layers, kv_heads = self.costs.shape[:2]
        check(
            (layers, kv_heads) == shape,
            f"needs are of {layers} layers x {kv_heads} KV heads, but the scores of {shape[0]} x {shape[1]}",
        )
        costs = torch.zeros_like(self.costs)
        costs[list(gated_layers)] = self.costs[list(gated_layers)]
        return replace(self, costs=costs)

    def __eq__(self, other: object) -> bool:
        """Whether spans and costs are equal."""
        return isinstance(other, SpanNeeds) and self.levels == other.levels and self.costs.equal(other.costs)


class PatternFields(Protocol):
    """What allocation and files read of a pattern: see `duo_id.patterns.pattern.HeadPattern`."""

    @property
    def scores(self) -> Tensor: ...  # noqa: D102
    @property
    def sink_size(self) -> int: ...  # noqa: D102
    @property
    def recent_size(self) -> int: ...  # noqa: D102
    @property
    def gated_layers(self) -> tuple[int, ...]: ...  # noqa: D102
    @property
    def needs(self) -> SpanNeeds | None: ...  # noqa: D102
