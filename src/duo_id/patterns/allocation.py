"""Attention spans within a budget: which head sees how far, when all of them share the bytes of a smaller cache."""

import math
import warnings
from collections.abc import Sequence
from fractions import Fraction
from itertools import pairwise
from numbers import Real

import numpy as np
import torch
from torch import Tensor

from duo_id.common.documents import excerpt
from duo_id.common.errors import UserError, check
from duo_id.patterns.fields import check_length
from duo_id.patterns.needs import PatternFields
from duo_id.patterns.spans import ALL, HeadSpans, kept_tokens


def allocate(pattern: PatternFields, cache: float, length: int) -> HeadSpans:
    """The spans of a pattern's heads within a share of the full cache's bytes; see `HeadPattern.allocate`."""
    check(
        isinstance(cache, Real) and not isinstance(cache, bool) and 0 < cache <= 1,
        f"cache={excerpt(cache)} must lie in (0, 1]: the share of the full cache's bytes to keep",
    )
    check_length(length)
    gated = list(pattern.gated_layers)
    scores = pattern.scores[gated].flatten()
    levels, costs = _levels_and_costs(pattern)
    kept = kept_tokens(torch.tensor(levels), pattern.sink_size, length).tolist()
    spans = torch.full(pattern.scores.shape, ALL)
    if kept[0] == length and cache < 1:
        warnings.warn(
            f"length={length}: sink_size={pattern.sink_size} and the smallest span, {levels[0]} tokens, hold the whole "
            "context, so all heads see it",
            stacklevel=3,
        )
    if kept[0] == length:
        return HeadSpans(spans, pattern.sink_size, pattern.gated_layers)
    budget = tokens_within(cache, len(scores) * length)
    if budget < len(scores) * kept[0]:
        raise UserError(
            f"cache={cache:g} at length={length} is less than sink_size={pattern.sink_size} and the smallest span, "
            f"{levels[0]} tokens, take: cache must be at least {-(-(10**4) * kept[0] // length) / 1e4:g}"
        )
    rank = scores.argsort(stable=True).argsort()
    chosen = best_levels(costs.numpy().astype(float), kept, rank.tolist(), budget)
    spans[gated] = torch.tensor(levels)[chosen].view(len(gated), -1)
    return HeadSpans(spans, pattern.sink_size, pattern.gated_layers)


def tokens_within(share: float, tokens: int) -> int:
    """The most tokens that are at most this share of `tokens`, taken as the decimal that was written."""
    return math.floor(Fraction(str(float(share))) * tokens)


def least_share(pattern: PatternFields, length: int) -> float:
    """The smallest share of the cache that `allocate` can keep of a context of `length` tokens."""
    smallest = torch.tensor(_levels_and_costs(pattern)[0][0])
    kept = int(kept_tokens(smallest, pattern.sink_size, length))
    return min(math.nextafter(kept / length, 1), 1.0)  # rounded up, never below what they keep


def best_levels(costs: np.ndarray, kept: Sequence[int] | np.ndarray, rank: Sequence[int], budget: int) -> list[int]:
    """The level of each head at which they cost least together while they keep at most `budget` tokens.

    This is a multiple-choice knapsack, solved greedily on the lower convex hull of each head's (tokens, cost) curve:
    from the smallest level of every head, the steps along the hulls are taken in the order of the cost that a token
    saves, until one does not fit. So far the choice is optimal for the tokens that it keeps, and part of the choice for
    any larger budget. What is left goes to whatever still fits, in the same order, which saves less than the step that
    did not fit. Among equal savings heads of higher rank come first.

    A span is taken to cost at most what a shorter one does: where estimates say otherwise, they are noise.

    Args:
        costs: (heads, levels).
        kept: tokens that a head keeps at each level, (levels,) or, if heads differ, (heads, levels); not descending.
        rank: of each head.
        budget: at least what all heads keep at the first level.
    """
    costs = np.minimum.accumulate(costs, axis=1)
    tokens, heads = np.broadcast_to(np.array(kept), costs.shape), np.arange(len(costs))
    last = costs.shape[1] - 1
    distinct = [[level for level in range(last) if row[level] < row[level + 1]] + [last] for row in tokens]
    steps = sorted(
        (slope, -rank[head], head, level)
        for head, levels in enumerate(distinct)
        for slope, level in _hull_steps(costs[head, levels], tokens[head, levels], levels)
    )
    chosen = np.array([levels[0] for levels in distinct], dtype=np.int64)
    rest = budget - int(tokens[heads, chosen].sum())
    for _, _, head, level in steps:
        more = int(tokens[head, level] - tokens[head, chosen[head]])
        if more > rest:
            break
        chosen[head], rest = level, rest - more
    while True:
        more_tokens = tokens - tokens[heads, chosen][:, None]
        fits = (more_tokens > 0) & (more_tokens <= rest)
        if not fits.any():
            return chosen.tolist()
        saved = costs[heads, chosen][:, None] - costs
        rates = np.where(fits, saved / np.maximum(more_tokens, 1), -np.inf)
        _, level, head = max((rank[head], level, head) for head, level in np.argwhere(rates == rates.max()))
        chosen[head], rest = level, rest - int(more_tokens[head, level])


def _hull_steps(costs: np.ndarray, tokens: np.ndarray, levels: Sequence[int]) -> list[tuple[float, int]]:
    """The steps along the lower convex hull of a head's curve, each as its slope and the level it leads to."""

    def slope(low: int, high: int) -> float:
        return float((costs[high] - costs[low]) / (tokens[high] - tokens[low]))

    corners = [0]
    for point in range(1, len(costs)):
        while len(corners) > 1 and slope(*corners[-2:]) > slope(corners[-1], point):
            corners.pop()
        corners.append(point)
    return [(slope(low, high), levels[high]) for low, high in pairwise(corners)]


def _levels_and_costs(pattern: PatternFields) -> tuple[tuple[int, ...], Tensor]:
    """Levels, and costs (gated heads, levels); without needs, all steps save the same and the scores decide."""
    gated = list(pattern.gated_layers)
    if pattern.needs is not None:
        return pattern.needs.levels, pattern.needs.costs[gated].flatten(0, 1)
    return (pattern.recent_size, ALL), torch.zeros(pattern.scores[gated].numel(), 2)
