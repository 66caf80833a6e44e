"""Which layers need more bits: what codes cost in each of them, and the formats of least cost within a budget.

A few layers lose most of what codes lose, by orders of magnitude (docs/lab/log.md), and losses of single layers add up.
Bits could be allocated to single heads (RateQuant, arXiv 2605.06675), which is little better than to layers here, and
takes a launch for each format in a layer.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from numbers import Real
from typing import Any

import torch
from rich.progress import track
from torch import Tensor

from duo_id.attention import codes
from duo_id.common.errors import check
from duo_id.deploy.install import dual_cache, duo_attention
from duo_id.deploy.prefill import check_ids, logits_in_groups
from duo_id.patterns.allocation import best_levels, tokens_within
from duo_id.patterns.pattern import HeadMask, HeadPattern
from duo_id.patterns.spans import ALL, HeadSpans

CODED = ("int4", "k8v4", "int8")  # by their bits


@dataclass(frozen=True)
class KvCosts:
    """What codes cost in each layer.

    Attributes:
        costs: (layers, formats) float64, in nats: the KL divergence of the next token's distribution from that with
            exact keys and values, if only this layer has codes, of each format in `CODED`.
        widths: of each layer, the numbers in the keys of one token: retrieval heads times their width.
    """

    costs: Tensor
    widths: Sequence[int]

    def allocate(self, bits: float) -> list[str]:
        """The formats of all layers that cost least together, for `duo_attention(model, mask, kv=...)`.

        Args:
            bits: of a number on average over the retrieval heads, without scales and zeros: from 4 (`int4` in all
                layers) to 8 (`int8`).

        Raises:
            UserError: codes cannot have so many bits on average.
        """
        real = isinstance(bits, Real) and not isinstance(bits, bool)
        check(real and 4 <= bits <= 8, f"bits={bits!r:.80} must be a number from 4 to 8, of a key or value on average")
        formats = ["exact"] * len(self.widths)
        layers = [layer for layer, width in enumerate(self.widths) if width]
        sizes = [sum(codes.bits_of(name) or ()) for name in CODED]  # of a key and a value
        kept = torch.tensor([[self.widths[layer] * size for size in sizes] for layer in layers]).view(-1, len(CODED))
        budget = tokens_within(bits, 2 * sum(self.widths))
        levels = best_levels(self.costs[layers].numpy(), kept.numpy(), layers, budget)
        for layer, level in zip(layers, levels, strict=True):
            formats[layer] = CODED[level]
        return formats


@torch.no_grad()
def kv_costs(
    model: Any,
    heads: HeadMask | HeadSpans | HeadPattern,
    samples: Sequence[Tensor],
    *,
    sparsity: float | None = None,
    threshold: float | None = None,
    progress: bool = False,
) -> KvCosts:
    """Measure what codes cost in each layer: each text is read exactly, then once for each layer and format.

    Every token sees what a decode step in its place would see. Those of the first group see no codes, and do not count.

    Args:
        model: not under a mask.
        heads: how far each head sees: a mask, spans, or a pattern with `sparsity` or `threshold`.
        samples: texts, each (batch, tokens) int64 without padding, longer than a group of 128 tokens. Two of a thousand
            tokens tell which layers matter.
        sparsity: of a pattern, see `duo_attention`.
        threshold: of a pattern, see `duo_attention`.
        progress: show a progress bar.

    Raises:
        UserError: a sample is too short, or `duo_attention` refuses the model or the heads.
    """
    check(isinstance(samples, list | tuple), f"samples: give a list of texts, not a {type(samples).__name__}")
    for ids in samples:
        check_ids("samples", ids)
        check(len(ids) > 0, "samples: a batch holds no text")
        check(
            ids.shape[1] > codes.GROUP,
            f"samples: {ids.shape[1]} tokens see no codes, which are made of {codes.GROUP}: give longer texts",
        )
    check(len(samples) > 0, "samples: give at least one text")
    with duo_attention(model, heads, sparsity=sparsity, threshold=threshold):
        cache = dual_cache(model)
        widths = [0] * len(cache.mask.spans)
        for each in cache.dual_layers:
            widths[each.layer.index] = each.spans.count(ALL) * each.layer.head_dim
        costs, read = torch.zeros(len(widths), len(CODED), dtype=torch.float64), 0
        trials = [(layer, level) for layer, width in enumerate(widths) if width for level in range(len(CODED))]
        for ids in samples:
            exact = list(logits_in_groups(model, ids, dual_cache(model, kv="exact")))[1:]
            read += ids.shape[0] * (ids.shape[1] - codes.GROUP)
            for layer, level in track(trials, "kv_costs", disable=not progress, transient=True):
                kv = ["exact"] * len(widths)
                kv[layer] = CODED[level]
                coded = islice(logits_in_groups(model, ids, dual_cache(model, kv=kv)), 1, None)
                costs[layer, level] += sum(_divergence(*pair) for pair in zip(exact, coded, strict=True))
    return KvCosts(costs / read, widths)


def _divergence(exact: Tensor, coded: Tensor) -> float:
    """The KL divergence of logits (batch, tokens, vocabulary) from others, summed over tokens."""
    wanted, found = (logits.to(torch.promote_types(logits.dtype, torch.float32)) for logits in (exact, coded))
    wanted, found = wanted.log_softmax(-1), found.log_softmax(-1)
    return float((wanted.exp() * (wanted - found)).sum())
