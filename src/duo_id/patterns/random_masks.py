"""Random masks of a pattern's budget: the baseline to beat."""

from collections.abc import Iterable

import torch
from torch import Tensor

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
    gated = tuple(range(layers) if gated_layers is None else gated_layers)
    return HeadPattern(_ranks(layers, kv_heads, seed), sink_size, recent_size, gated).binarize(sparsity=sparsity)


def random_pattern(pattern: HeadPattern, seed: int) -> HeadPattern:
    """A random order of the heads of a pattern, with the same window; its masks are those of `random_like`."""
    layers, kv_heads = pattern.scores.shape
    ranks = _ranks(layers, kv_heads, seed)
    return HeadPattern(ranks, pattern.sink_size, pattern.recent_size, pattern.gated_layers)


def random_like(pattern: HeadPattern, sparsity: float, seed: int) -> HeadMask:
    """A random mask for the model of a pattern, with the same window."""
    return random_pattern(pattern, seed).binarize(sparsity=sparsity)


def _ranks(layers: int, kv_heads: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(layers * kv_heads, generator=generator).view(layers, kv_heads)
