"""Patterns that formats find hard: ties, masks, layers without gates."""

import torch

from duo_id.patterns.pattern import HeadPattern

LAYERS, KV_HEADS, HEADS = 6, 3, 6


def pattern(scores: torch.Tensor, gated: tuple[int, ...] | None = None) -> HeadPattern:
    layers, kv_heads = scores.shape
    model = {"id": "someone/a-model", "layers": layers, "kv_heads": kv_heads, "heads": 2 * kv_heads}
    return HeadPattern(scores, 16, 64, gated, {"model": model})


def random(layers: int, kv_heads: int) -> torch.Tensor:
    return torch.rand(layers, kv_heads, generator=torch.Generator().manual_seed(layers))


def trained(layers: int, kv_heads: int) -> torch.Tensor:
    """As gates come out: many at 1, many at 0, some a little below."""
    return ((random(layers, kv_heads) - 0.5) * 4).clamp(-1e-3, 1)


SHAPE = (LAYERS, KV_HEADS)
CASES = {
    "random": pattern(random(*SHAPE)),
    "trained": pattern(trained(*SHAPE)),
    "ties": pattern((random(*SHAPE) * 3).round() / 3),
    "zeros": pattern(torch.zeros(SHAPE)),
    "ones": pattern(torch.ones(SHAPE)),
    "close": pattern(0.5 + torch.arange(18.0).view(SHAPE) * 2**-24),
    "hybrid": pattern(trained(*SHAPE), (1, 3, 4)),
}


def all_masks(given: HeadPattern) -> list[list[list[bool]]]:
    """The mask of every budget."""
    budgets = range(given.gated_heads + 1)
    return [given.binarize(sparsity=count / given.gated_heads).retrieval.tolist() for count in budgets]
