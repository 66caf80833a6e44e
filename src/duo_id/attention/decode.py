"""One decode step of a layer under a hard mask: store the new token and attend, without synchronising the device."""

from collections.abc import Iterator, Sequence
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor

from duo_id.attention.softmax import Softmax
from duo_id.common.errors import check


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
    dropped: int = 0,
    places: Tensor | None = None,
) -> Tensor:
    """Store a new token in its layer's slots and attend from it; the number of tokens is read on the device.

    Slot t - dropped of a retrieval head holds token t; where tokens were evicted, those that stayed come before. Slot t
    of a streaming head holds token t of the first `sink_size`, and the others are a ring: slot
    sink_size + (t - sink_size) % span holds token t.

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
        dropped: how many tokens before the new one are in no slot of any retrieval head, the same for all samples.
        places: (batch, 3, retrieval heads) int32, where that number is not the same: of each retrieval head the first
            row, the slots, and the tokens dropped. Then `full_key` is (batch, rows, head_dim), like `recent_key`.

    Returns:
        (batch, query heads, 1, head_dim).

    Raises:
        UserError: there is no slot for the token, on a CPU; a GPU does not store it.
    """
    softmax, device = Softmax(scale, softcap, sinks), query.device
    if query.is_cuda and softmax.plain:
        from duo_id.attention.kernels.decode import decode

        stores, listed = (full_key, full_value, recent_key, recent_value), (retrieval, streaming)
        return decode(query, key, value, *stores, *listed, lengths, arrived, slots, sink_size, scale, dropped, places)
    out = torch.empty(query.shape, dtype=query.dtype, device=device)
    full = retrieval.long(), full_key, full_value
    if places is not None:
        ragged = attend_without_waiting if query.is_cuda else store_and_attend_ragged
        ragged(query, key, value, *full, places, lengths, softmax, out)
    else:
        held = lengths - dropped
        check_room(held, full_key.shape[2])
        store_and_attend(query, key, value, *full, held - 1, held, softmax, out)
    for group in ring_groups(recent_key, recent_value, streaming, lengths, spans, slots, sink_size):
        store_and_attend(query, key, value, *group, lengths, softmax, out)
    return out


def check_room(lengths: Tensor, slots: int) -> None:
    """Raise a `UserError` if a sample has more tokens than slots, unless only a GPU knows."""
    if not lengths.is_cuda:
        needed = int(lengths.max())
        check(needed <= slots, f"the static cache has room for {slots} tokens, not {needed}: use a larger max_length")


def store_token(stored: Tensor, new: Tensor, slot: Tensor) -> None:
    """Store a token of each sample (batch, heads, head_dim) in its `slot` (batch,) of `stored`, if there is such a one.

    Args:
        stored: (batch, heads, slots, head_dim).
        new: of the token.
        slot: int64.
    """
    samples, last = torch.arange(len(stored), device=stored.device), stored.shape[2] - 1
    place = slot.clamp(max=last)
    stored[samples, :, place] = torch.where((slot <= last)[:, None, None], new, stored[samples, :, place])


HeadGroup = tuple[Tensor, Tensor, Tensor, Tensor]  # KV heads, their keys and values, and the new token's slot


def ring_groups(
    recent_key: Tensor,
    recent_value: Tensor,
    streaming: Tensor,
    lengths: Tensor,
    spans: Sequence[int],
    slots: Sequence[int],
    sink_size: int,
) -> Iterator[HeadGroup]:
    """The streaming heads, those of one span together; see `decode_attention`."""
    past, first, row = lengths - 1, 0, 0
    for (span, size), members in groupby(zip(spans, slots, strict=True)):
        count = len(list(members))
        heads = streaming[0, first : first + count].long()
        keys, values = (x[:, row : row + count * size].unflatten(1, (count, size)) for x in (recent_key, recent_value))
        yield heads, keys, values, torch.where(past < sink_size, past, sink_size + (past - sink_size) % span)
        first, row = first + count, row + count * size


def store_and_attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    heads: Tensor,
    keys: Tensor,
    values: Tensor,
    slot: Tensor,
    lengths: Tensor,
    softmax: Softmax,
    out: Tensor,
) -> None:
    """Store a new token of some KV heads in its slot and attend from it, without a kernel of our own."""
    if not len(heads):
        return
    kv_heads = key.shape[1]
    for stored, new in ((keys, key), (values, value)):
        store_token(stored, new[:, heads, 0], slot)
    used = keys.shape[2] if query.is_cuda else min(keys.shape[2], int(lengths.max()))
    visible = (torch.arange(used, device=query.device) < lengths[:, None])[:, None, None]
    queries = query.unflatten(1, (kv_heads, -1))[:, heads].flatten(1, 2)
    inputs = (queries, keys[:, :, :used], values[:, :, :used])
    if softmax.plain:
        found = F.scaled_dot_product_attention(*inputs, attn_mask=visible, scale=softmax.scale, enable_gqa=True)
    else:
        found = softmax.of(heads, kv_heads).attend(*inputs, visible)
    out.unflatten(1, (kv_heads, -1))[:, heads] = found.unflatten(1, (len(heads), -1))


def store_and_attend_ragged(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    heads: Tensor,
    keys: Tensor,
    values: Tensor,
    places: Tensor,
    lengths: Tensor,
    softmax: Softmax,
    out: Tensor,
) -> None:
    """As `store_and_attend`, for heads of unequal lengths, each in its `places` of `keys` (batch, rows, head_dim)."""
    check_room(lengths, int((places[:, 1] + places[:, 2]).min()))
    for sample, given in enumerate(places.tolist()):
        one = slice(sample, sample + 1)
        new = query[one], key[one], value[one]
        for place, (first, slots, dropped) in enumerate(zip(*given, strict=True)):
            own, held = (one, None, slice(first, first + slots)), lengths[one] - dropped
            head = heads[place : place + 1]
            store_and_attend(*new, head, keys[own], values[own], held - 1, held, softmax, out[one])


def attend_without_waiting(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    heads: Tensor,
    keys: Tensor,
    values: Tensor,
    places: Tensor,
    lengths: Tensor,
    softmax: Softmax,
    out: Tensor,
) -> None:
    """`store_and_attend_ragged` where only the device knows lengths: over all rows, of which a head sees its own."""
    first, slots, dropped = places.long().unbind(1)
    kv_heads, held = key.shape[1], lengths[:, None] - dropped
    samples, last = torch.arange(len(keys), device=keys.device)[:, None], first + slots - 1
    row, fits = torch.minimum(first + held - 1, last), (held <= slots)[..., None]
    for stored, new in ((keys, key), (values, value)):
        stored[samples, row] = torch.where(fits, new[:, heads, 0], stored[samples, row])
    rows = torch.arange(keys.shape[1], device=keys.device)
    visible = (rows >= first[..., None]) & (rows < (first + torch.minimum(held, slots))[..., None])
    queries = query.unflatten(1, (kv_heads, -1))[:, heads]
    visible = visible.repeat_interleave(queries.shape[2], 1)[:, :, None]
    found = softmax.of(heads, kv_heads).attend(queries.flatten(1, 2), keys[:, None], values[:, None], visible)
    out.unflatten(1, (kv_heads, -1))[:, heads] = found.unflatten(1, queries.shape[1:3])


@decode_attention.register_fake
def _(query: Tensor, *rest: object) -> Tensor:
    return torch.empty(query.shape, dtype=query.dtype, device=query.device)
