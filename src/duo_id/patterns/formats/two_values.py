"""Spans for formats that know two kinds of heads: the nearest mask, as a pattern and a sparsity.

Heads that see all tokens keep doing so; all others get one window, with which they keep the bytes of their spans.
"""

from dataclasses import replace

import torch

from duo_id.patterns.formats.options import Options
from duo_id.patterns.mask import HeadMask
from duo_id.patterns.pattern import HeadPattern
from duo_id.patterns.spans import ALL, HeadSpans, kept_tokens


def nearest_mask(spans: HeadSpans, length: int, recent_size: int) -> HeadMask:
    """The mask with the retrieval heads of spans and, but for half a token a head, their bytes.

    Args:
        spans: of any sizes.
        length: of the context at which bytes are compared, in tokens.
        recent_size: of the mask if all heads see all tokens.
    """
    if bool((streaming := ~spans.retrieval).any()):
        kept = kept_tokens(spans.spans[streaming], spans.sink_size, length)
        recent_size = max(1, round(kept.double().mean().item()) - spans.sink_size)
    return HeadMask(spans.retrieval, spans.sink_size, recent_size, spans.gated_layers)


def as_two_values(pattern: HeadPattern, options: Options) -> tuple[HeadPattern, Options, list[str]]:
    """The spans of a pattern within a share of the cache, as what a format of two values can hold.

    Args:
        pattern: with or without needs.
        options: with `cache` and `length`.

    Returns:
        a pattern, options whose sparsity makes the nearest mask of it, and what it lacks, in words.

    Raises:
        UserError: see `HeadPattern.allocate`.
    """
    cache, length = options.cache, options.require("length", "cache=... is a share of the cache at a length")
    assert cache is not None
    spans = pattern.allocate(cache, length)
    mask = nearest_mask(spans, length, pattern.recent_size)
    gated, lost = list(pattern.gated_layers), []
    order = pattern.scores[gated].flatten().argsort(stable=True)
    kept = mask.retrieval[gated].flatten()[order]
    scores = pattern.scores
    if not kept.sort(stable=True).values.equal(
        kept
    ):  # some head that streams has a higher score than one that does not
        order = order[kept.long().argsort(stable=True)]
        ranks = torch.empty(len(order)).index_copy_(0, order, torch.arange(len(order)) / len(order))
        scores = torch.ones_like(scores)
        scores[gated] = ranks.view(len(gated), -1)
        lost.append("scores (ranks remain)")
    windows = spans.spans[spans.spans != ALL].unique().tolist()
    if len(windows) > 1:
        lost.append(f"spans ({windows[0]} to {windows[-1]} tokens become recent_size={mask.recent_size})")
    if pattern.needs is not None:
        lost.append("needs")
    provenance = pattern.provenance | {"spans": {"cache": cache, "length": length}}
    written = replace(pattern, scores=scores, recent_size=mask.recent_size, provenance=provenance, needs=None)
    return written, replace(options, sparsity=mask.sparsity, cache=None, length=None), lost
