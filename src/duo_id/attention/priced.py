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
    alternatives = [(masked_heads(other, sink_size, backends), other.equal(spans)) for other in others]

    def attend(query: Tensor, key: Tensor, value: Tensor, softmax: Softmax, rows: Tensor | None = None) -> Tensor:
        chosen = attend_chosen(query, key, value, softmax, rows=rows)
        slope = torch.zeros((), device=query.device)
        for share, (attend_other, is_same) in zip(shares, alternatives, strict=True):
            if is_same:
                continue
            with torch.no_grad():
                difference = attend_other(query, key, value, softmax, rows=rows) - chosen
            slope = slope + share.repeat_interleave(query.shape[1] // key.shape[1])[:, None, None] * difference
        return chosen + slope.to(chosen.dtype)

    return attend


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
