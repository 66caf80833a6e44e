"""Head patterns combined: the mean of seeds, and a prior's part in scores."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from duo_id.patterns.needs import SpanNeeds
from duo_id.patterns.pattern import HeadPattern


def average(patterns: Sequence[HeadPattern]) -> HeadPattern:
    """The pattern with the mean scores of several seeds, which agree in everything else; a single one is returned.

    It has the mean needs at the spans that all of them were measured at: a seed with shorter samples lacks the longest.
    """
    if len(patterns) == 1:
        return patterns[0]
    scores = torch.stack([pattern.scores for pattern in patterns]).mean(0)
    seeds = [pattern.provenance.get("seed") for pattern in patterns]
    needs = [pattern.needs for pattern in patterns if pattern.needs is not None]
    shared = _mean_needs(needs) if len(needs) == len(patterns) else None
    return replace(patterns[0], scores=scores, provenance=patterns[0].provenance | {"seeds": seeds}, needs=shared)


def _mean_needs(needs: Sequence[SpanNeeds]) -> SpanNeeds | None:
    levels = [level for level in needs[0].levels if all(level in each.levels for each in needs)]
    if len(levels) < 2:  # the whole context alone
        return None
    costs = [each.costs[..., [each.levels.index(level) for level in levels]] for each in needs]
    return SpanNeeds(tuple(levels), torch.stack(costs).mean(0))


def normalized_ranks(scores: Tensor) -> Tensor:
    """The rank of each score (any shape), from 0 for the lowest to 1; equal scores share their mean rank."""
    _, which, counts = scores.unique(return_inverse=True, return_counts=True)
    middle = counts.cumsum(0) - (counts + 1) / 2
    return (middle / max(scores.numel() - 1, 1))[which]


def mix_prior(pattern: HeadPattern, prior: HeadPattern, weight: float) -> HeadPattern:
    """Average a pattern's scores with the ranks of a prior.

    Where a method hardly separates heads, chance decides their order; there the prior decides instead, and it changes
    little where scores differ clearly.

    Args:
        pattern: with scores in about [0, 1], such as gates.
        prior: only its order matters, over the gated layers of `pattern`.
        weight: positive weight of a head's rank in the prior (`normalized_ranks`); its own score has weight 1.

    Returns:
        the pattern with the weighted means of both.

    Raises:
        UserError: the prior has another shape, or lacks scores for a gated layer.
    """
    layers, kv_heads = pattern.scores.shape
    prior.check_fits(layers, kv_heads, "the pattern")
    prior.check_scores(pattern.gated_layers)
    gated, scores = list(pattern.gated_layers), pattern.scores.clone()
    scores[gated] = scores[gated].lerp(normalized_ranks(prior.scores[gated]), weight / (1 + weight))
    return replace(pattern, scores=scores)
