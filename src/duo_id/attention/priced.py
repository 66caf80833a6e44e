"""Heads under attention spans, with a slope towards other spans: what one backward pass says each of these is worth."""

from collections.abc import Sequence

import torch
from torch import Tensor

from duo_id.attention.functions import AttendFunction, Backends, masked_heads
from duo_id.attention.layers import AttentionLayer
from duo_id.attention.softmax import Softmax


def priced_heads(spans: Tensor, others: Tensor, shares: Tensor, sink_size: int, backends: Backends) -> AttendFunction:
    """A layer whose heads have `spans`, with a share of other spans that is 0 but has a gradient.

    The gradient of a loss with respect to a head's share of another span is how much the loss would change, to first
    order, if the head had that span: a price. What the other spans attend to has no gradient of its own.

    Args:
        spans: (KV heads,) int32, in tokens; -1 = all.
        others: (n, KV heads) int32, the spans that are priced.
        shares: (n, KV heads) float32 zeros that require a gradient.
        sink_size: first tokens that every head sees.
        backends: implementations.
    """
    attend_chosen = masked_heads(spans, sink_size, backends)

    def attend(query: Tensor, key: Tensor, value: Tensor, softmax: Softmax, rows: Tensor | None = None) -> Tensor:
        kv_heads, tokens = key.shape[1:3]
        chosen = attend_chosen(query, key, value, softmax, rows=rows)
        grouped, grouped_query = (x.unflatten(1, (kv_heads, -1)) for x in (chosen, query))
        slope = torch.zeros_like(grouped, dtype=shares.dtype)
        seen, others_seen = (_seen(x, sink_size, tokens) for x in (spans, others))
        for other, share, differs in zip(others, shares, others_seen != seen, strict=True):
            heads = differs.nonzero()[:, 0].tolist()
            if not heads:
                continue
            inputs = (
                grouped_query[:, heads].flatten(1, 2),
                key[:, heads],
                value[:, heads],
                softmax.of(heads, kv_heads),
            )
            with torch.no_grad():
                attended = masked_heads(other[heads], sink_size, backends)(*inputs, rows=rows)
                difference = torch.zeros_like(grouped)
                difference[:, heads] = attended.unflatten(1, (len(heads), -1)) - grouped[:, heads]
            slope = slope + share[:, None, None, None] * difference
        return chosen + slope.flatten(1, 2).to(chosen.dtype)

    return attend


def _seen(spans: Tensor, sink_size: int, tokens: int) -> Tensor:
    """Spans of which all that leave no gap in a text of `tokens` tokens are -1, so that equal ones see the same."""
    return torch.where(spans + sink_size >= tokens, -1, spans)


def priced_layers(
    layers: Sequence[AttentionLayer], spans: Tensor, others: Tensor, shares: Tensor, sink_size: int, backends: Backends
) -> dict[int, AttendFunction]:
    """The function of each gated layer, for `bound`; tensors have a dimension of gated layers before that of KV heads.

    For the arguments see `priced_heads`.
    """
    return {
        layer.index: priced_heads(
            spans[row][layer.own], others[:, row][:, layer.own], shares[:, row][:, layer.own], sink_size, backends
        )
        for row, layer in enumerate(layers)
    }
