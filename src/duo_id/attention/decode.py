"""One decode step of a layer under a hard mask: store the new token and attend, without synchronising the device."""

from collections.abc import Sequence
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor

from duo_id.attention.softmax import Softmax


@torch.library.custom_op(
    "duo_id::decode", mutates_args=("full_key", "full_value", "recent_key", "recent_value", "arrived")
)
def decode_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    full_key: Tensor,
    full_value: Tensor,
    recent_key: Tensor,
    recent_value: Tensor,
    retrieval: Tensor,
    streaming: Tensor,
    lengths: Tensor,
    arrived: Tensor,
    spans: Sequence[int],
    slots: Sequence[int],
    sink_size: int,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Store a new token in its layer's slots and attend from it; the number of tokens is read on the device.

    Slot t of a retrieval head holds token t. A streaming head's first `sink_size` slots do the same, and the others are
    a ring: slot sink_size + (t - sink_size) % span holds token t.

    Args:
        query: (batch, query heads, 1, head_dim); like all tensors here, its last dimension is contiguous.
        key: (batch, KV heads, 1, head_dim) of the new token.
        value: the same shape.
        full_key: (batch, retrieval heads, capacity, head_dim), contiguous; written.
        full_value: the same shape; written.
        recent_key: (batch, rows, head_dim), contiguous, the slots of one streaming head after the other; written.
        recent_value: the same shape; written.
        retrieval: (retrieval heads,) int32, the KV heads of `full_key`, in its order.
        streaming: (3, streaming heads) int32, the KV head, first row and span of each head of `recent_key`.
        lengths: (batch,) int64, each sample's number of tokens, including the new one.
        arrived: (batch * KV heads,) int32 zeros, zero again afterwards: counts the programs that have finished.
        spans: of the streaming heads, the most recent tokens that each sees, longest first; those in `streaming`.
        slots: of the streaming heads: sink_size + span, or fewer if no sample has as many tokens.
        sink_size: first tokens that streaming heads see.
        scale: factor on the scores.
        softcap: see `Softmax`.
        sinks: (query heads,), see `Softmax`.

    Returns:
        (batch, query heads, 1, head_dim).
    """
    softmax, device = Softmax(scale, softcap, sinks), query.device
    if query.is_cuda and softmax.plain:
        from duo_id.attention.kernels.decode import decode

        stores, listed = (full_key, full_value, recent_key, recent_value), (retrieval, streaming)
        return decode(query, key, value, *stores, *listed, lengths, arrived, slots, sink_size, scale)
    past = lengths - 1
    kv_heads, samples = key.shape[1], torch.arange(len(query), device=device)
    groups = [(retrieval.long(), full_key, full_value, past)]
    first = row = 0
    for (span, size), members in groupby(zip(spans, slots, strict=True)):
        count = len(list(members))
        heads = streaming[0, first : first + count].long()
        keys, values = (x[:, row : row + count * size].unflatten(1, (count, size)) for x in (recent_key, recent_value))
        slot = torch.where(past < sink_size, past, sink_size + (past - sink_size) % span)
        groups.append((heads, keys, values, slot))
        first, row = first + count, row + count * size
    grouped = query.unflatten(1, (kv_heads, -1))
    out = torch.empty(grouped.shape, dtype=query.dtype, device=device)
    for heads, keys, values, column in groups:
        if not len(heads):
            continue
        keys[samples, :, column] = key[:, heads, 0]
        values[samples, :, column] = value[:, heads, 0]
        used = keys.shape[2] if query.is_cuda else min(keys.shape[2], int(lengths.max()))
        visible = (torch.arange(used, device=device) < lengths[:, None])[:, None, None]
        inputs = (grouped[:, heads].flatten(1, 2), keys[:, :, :used], values[:, :, :used])
        if softmax.plain:
            part = F.scaled_dot_product_attention(*inputs, attn_mask=visible, scale=scale, enable_gqa=True)
        else:
            part = softmax.of(heads, kv_heads).attend(*inputs, visible)
        out[:, heads] = part.unflatten(1, (len(heads), -1))
    return out.flatten(1, 2)


@decode_attention.register_fake
def _(query: Tensor, *rest: object) -> Tensor:
    return torch.empty(query.shape, dtype=query.dtype, device=query.device)
