"""One decode step of a layer whose retrieval heads keep codes; see `duo_id.attention.decode` and `.codes`."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from duo_id.attention.codes import dequantise_keys, dequantise_values, quantise_keys, quantise_values
from duo_id.attention.decode import check_room, ring_groups, store_and_attend, store_token
from duo_id.attention.softmax import Softmax, join

SLICE = 8192  # tokens that are numbers again at the same time
WIDEST = 512  # bytes of a head in the query's type, for which the kernel has registers and shared memory


@torch.library.custom_op(
    "duo_id::decode_codes",
    mutates_args=(
        "key_codes", "key_scales", "value_codes", "value_scales", "tail_key", "tail_value", "recent_key",
        "recent_value", "arrived",
    ),
)  # fmt: skip
def decode_codes_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_codes: Tensor,
    key_scales: Tensor,
    value_codes: Tensor,
    value_scales: Tensor,
    tail_key: Tensor,
    tail_value: Tensor,
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
    """Store a new token and attend from it, to groups that were complete before from their codes and exactly to others.

    If the token completes a group, its codes are written.

    Args:
        query: (batch, query heads, 1, head_dim); like all tensors here, its last dimension is contiguous.
        key: (batch, KV heads, 1, head_dim) of the new token.
        value: the same shape.
        key_codes: (batch, retrieval heads, groups, planes, group, head_dim / 2) uint8, contiguous; written.
        key_scales: (batch, retrieval heads, groups, head_dim, 2), scale and zero, contiguous; written.
        value_codes: (batch, retrieval heads, groups, planes, head_dim / 2, group) uint8, contiguous; written.
        value_scales: (batch, retrieval heads, groups, group, 2), scale and zero, contiguous; written.
        tail_key: (batch, retrieval heads, 2 * group, head_dim), contiguous, token t in slot t % (2 * group); written.
        tail_value: the same shape; written.
        recent_key: see `decode_attention`, as for all arguments below.
        recent_value: the same shape; written.
        retrieval: (retrieval heads,) int32, the KV heads of the codes, in their order.
        streaming: (3, streaming heads) int32.
        lengths: (batch,) int64, with the new token.
        arrived: (batch * KV heads,) int32 zeros.
        spans: of the streaming heads.
        slots: of the streaming heads.
        sink_size: first tokens that streaming heads see.
        scale: factor on the scores.
        softcap: see `Softmax`.
        sinks: (query heads,), see `Softmax`.

    Returns:
        (batch, query heads, 1, head_dim).

    Raises:
        UserError: see `decode_attention`; the group after the last one of codes has room, too.
    """
    softmax, kv_heads = Softmax(scale, softcap, sinks), key.shape[1]
    coded = key_codes, key_scales, value_codes, value_scales
    fits = query.shape[-1] * query.element_size() <= WIDEST and query.dtype != torch.float64
    if query.is_cuda and softmax.plain and fits:
        from duo_id.attention.kernels.decode_codes import decode_codes

        stores, listed = (*coded, tail_key, tail_value, recent_key, recent_value), (retrieval, streaming)
        return decode_codes(query, key, value, *stores, *listed, lengths, arrived, slots, sink_size, scale)
    check_room(lengths, key_codes.shape[2] * (tail_key.shape[2] // 2) + tail_key.shape[2] // 2)
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    for group in ring_groups(recent_key, recent_value, streaming, lengths, spans, slots, sink_size):
        store_and_attend(query, key, value, *group, lengths, softmax, out)
    if len(retrieval):
        heads = retrieval.long()
        queries = query.unflatten(1, (kv_heads, -1))[:, heads].flatten(1, 2)
        parts = _parts(queries, key[:, heads], value[:, heads], coded, (tail_key, tail_value), lengths, softmax)
        found = join(parts, softmax.of(heads, kv_heads)).to(out.dtype)
        out.unflatten(1, (kv_heads, -1))[:, heads] = found.unflatten(1, (len(heads), -1))
    return out


def _parts(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    coded: tuple[Tensor, Tensor, Tensor, Tensor],
    tails: tuple[Tensor, Tensor],
    lengths: Tensor,
    softmax: Softmax,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Store the new token of the retrieval heads, and attend to the group that it is in and to slices of the others."""
    key_codes, key_scales, value_codes, value_scales = coded
    device, size, groups = query.device, tails[0].shape[2] // 2, key_codes.shape[2]
    samples, past = torch.arange(len(query), device=device), lengths - 1
    complete = (past // size).clamp(max=groups)  # groups that are read as codes
    slot = torch.where(past < (complete + 1) * size, past % (2 * size), 2 * size)  # the last means that it has no room
    for tail, new in zip(tails, (key, value), strict=True):
        store_token(tail, new[:, :, 0], slot)
    token = (complete * size)[:, None] + torch.arange(size, device=device)
    keys, values = (tail[samples[:, None], :, token % (2 * size)].transpose(1, 2) for tail in tails)
    yield softmax.attend_part(query, keys, values, (token < lengths[:, None])[:, None, None])
    read = groups if query.is_cuda else int(complete.max())
    step = max(1, SLICE // size)
    for start in range(0, read, step):
        part = slice(start, min(start + step, read))
        numbers = (
            dequantise_keys(key_codes[:, :, part], key_scales[:, :, part]),
            dequantise_values(value_codes[:, :, part], value_scales[:, :, part]),
        )
        token = start * size + torch.arange(numbers[0].shape[2], device=device)
        yield softmax.attend_part(query, *numbers, (token < (complete * size)[:, None])[:, None, None])
    closes, place = (lengths % size == 0) & (complete < groups), complete.clamp(max=groups - 1)
    if not groups or not (query.is_cuda or closes.any()):  # a GPU does not wait to know
        return
    bits = 4 * key_codes.shape[3], 4 * value_codes.shape[3]
    new_codes = *quantise_keys(keys, bits[0], size), *quantise_values(values, bits[1], size)
    for stored, new in zip(coded, new_codes, strict=True):
        old = stored[samples, :, place]
        stored[samples, :, place] = torch.where(closes.view(-1, *[1] * (old.dim() - 1)), new[:, :, 0], old)


@decode_codes_attention.register_fake
def _(query: Tensor, *rest: object) -> Tensor:
    return torch.empty(query.shape, dtype=query.dtype, device=query.device)
