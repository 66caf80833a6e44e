"""Random masks of a pattern's budget: the baseline to beat."""

from collections.abc import Iterable

import torch

from duo_id.patterns.mask import HeadMask
from duo_id.patterns.pattern import HeadPattern


def random_mask(
    layers: int,
    kv_heads: int,
    sparsity: float,
    seed: int,
    *,
    sink_size: int,
    recent_size: int,
    gated_layers: Iterable[int] | None = None,
) -> HeadMask:
    """A mask with the same budget as `HeadPattern.binarize`, but with random heads: the baseline to beat.

    Deterministic in its arguments; masks of one seed are nested over sparsity.
    """
    ranks = torch.randperm(layers * kv_heads, generator=torch.Generator().manual_seed(seed)).view(layers, kv_heads)
    gated = tuple(range(layers) if gated_layers is None else gated_layers)
    return HeadPattern(ranks, sink_size, recent_size, gated).binarize(sparsity=sparsity)


def random_like(pattern: HeadPattern, sparsity: float, seed: int) -> HeadMask:
    """A random mask for the model of a pattern, with the same window."""
    layers, kv_heads = pattern.scores.shape
    sizes = {"sink_size": pattern.sink_size, "recent_size": pattern.recent_size}
    return random_mask(layers, kv_heads, sparsity, seed, gated_layers=pattern.gated_layers, **sizes)
