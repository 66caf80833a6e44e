"""One decode step of a layer under a hard mask: store the new token and attend, without synchronising the device."""

import torch
import torch.nn.functional as F
from torch import Tensor

from duo_id.attention.softmax import Softmax
from duo_id.attention.window import Window


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
    heads: Tensor,
    lengths: Tensor,
    arrived: Tensor,
    sink_size: int,
    recent_size: int,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Store a new token in its layer's slots and attend from it; the number of tokens is read on the device.

    Slot t of a retrieval head holds token t. A streaming head's first `sink_size` slots do the same, and the others are
    a ring: slot sink_size + (t - sink_size) % recent_size holds token t.

    Args:
        query: (batch, query heads, 1, head_dim); like all tensors here, its last dimension is contiguous.
        key: (batch, KV heads, 1, head_dim) of the new token.
        value: the same shape.
        full_key: (batch, retrieval heads, capacity, head_dim), contiguous; written.
        full_value: the same shape; written.
        recent_key: (batch, streaming heads, sink_size + recent_size, head_dim), contiguous; written.
        recent_value: the same shape; written.
        heads: (KV heads,) int32, the retrieval heads, then the streaming heads, each in the order of its store.
        lengths: (batch,) int64, each sample's number of tokens, including the new one.
        arrived: (batch * KV heads,) int32 zeros, zero again afterwards: counts the programs that have finished.
        sink_size: first tokens that streaming heads see.
        recent_size: most recent tokens that streaming heads see.
        scale: factor on the scores.
        softcap: see `Softmax`.
        sinks: (query heads,), see `Softmax`.

    Returns:
        (batch, query heads, 1, head_dim).
    """
    softmax, device = Softmax(scale, softcap, sinks), query.device
    if query.is_cuda and softmax.plain:
        from duo_id.attention.kernels import cached

        stores = (full_key, full_value, recent_key, recent_value)
        return cached.decode(query, key, value, *stores, heads, lengths, arrived, Window(sink_size, recent_size), scale)
    past = lengths - 1
    slot = torch.where(past < sink_size, past, sink_size + (past - sink_size) % recent_size)
    retrieval, streaming = heads.long().split([full_key.shape[1], recent_key.shape[1]])
    grouped = query.unflatten(1, (len(heads), -1))
    out = torch.empty(grouped.shape, dtype=query.dtype, device=device)
    for group, keys, values, column in (
        (retrieval, full_key, full_value, past),
        (streaming, recent_key, recent_value, slot),
    ):
        if not len(group):
            continue
        samples = torch.arange(len(query), device=device)
        keys[samples, :, column] = key[:, group, 0]
        values[samples, :, column] = value[:, group, 0]
        used = keys.shape[2] if query.is_cuda else min(keys.shape[2], int(lengths.max()))
        visible = (torch.arange(used, device=device) < lengths[:, None])[:, None, None]
        inputs = (grouped[:, group].flatten(1, 2), keys[:, :, :used], values[:, :, :used])
        if softmax.plain:
            part = F.scaled_dot_product_attention(*inputs, attn_mask=visible, scale=scale, enable_gqa=True)
        else:
            part = softmax.of(group, len(heads)).attend(*inputs, visible)
        out[:, group] = part.unflatten(1, (len(group), -1))
    return out.flatten(1, 2)


@decode_attention.register_fake
def _(query: Tensor, *rest: object) -> Tensor:
    return torch.empty(query.shape, dtype=query.dtype, device=query.device)
