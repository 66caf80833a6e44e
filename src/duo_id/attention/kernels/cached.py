"""Triton kernels for deployed masks: one launch for a decode step of a layer, one for its streaming heads in prefill.

Both read the stores of `duo_id.deploy.stores` in place, decoding also writes them. They take the heads of each kind as
a list, and share a KV head's keys among its query group without repeating them. Softmax is online, in base 2.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from duo_id.attention.window import Window

LOG2_E = 1.4426950408889634
# Tuned on an H200; see docs/performance.md.
DECODE_TUNING = {"block": 128, "warps": 4, "stages": 3}
STREAM_TUNING = {"rows": 128, "block": 32, "warps": 4, "stages": 3}
STREAMS_PER_SM = 4  # next to long retrieval heads, one multiprocessor handles this many (short) streaming heads
TILE_BYTES = 128 * 128 * 2  # of a block of keys, so that the stages fit into shared memory

FAR_BELOW = tl.constexpr(-1e30)  # below any score; unlike -inf it can be subtracted from itself


@triton.jit
def fold(query, key, value, visible, row_max, total, out, scale, MASKED: tl.constexpr, PRECISION: tl.constexpr):  # type: ignore[no-untyped-def]
    """Fold one block of keys (n, dim) into the running softmax of the queries (m, dim)."""
    scores = tl.dot(query, tl.trans(key), input_precision=PRECISION) * scale
    if MASKED:
        scores = tl.where(visible, scores, float("-inf"))
    new_max = tl.maximum(row_max, tl.max(scores, 1))
    weights = tl.exp2(scores - new_max[:, None])
    rescale = tl.exp2(row_max - new_max)
    total = total * rescale + tl.sum(weights, 1)
    out = tl.dot(weights.to(value.dtype), value, out * rescale[:, None], input_precision=PRECISION)
    return new_max, total, out


@triton.jit
def _decode(  # type: ignore[no-untyped-def]
    query, key, value, full_key, full_value, recent_key, recent_value, heads, lengths, arrived, partial, output,
    scale, query_batch, query_head, key_batch, key_head, value_batch, value_head, capacity, sink, recent,
    full_heads, streaming_heads, splits,
    GROUP: tl.constexpr, ROWS: tl.constexpr, DIM: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
    TILE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`splits` programs for each retrieval head, along its past, then one for each streaming head.

    The first program of a head stores its new token; the last one to finish a retrieval head sums its parts.
    """
    program, batch = tl.program_id(0), tl.program_id(1).to(tl.int64)
    past = tl.load(lengths + batch) - 1  # lengths include the new token
    if program >= full_heads * splits:
        store, split, parts = program - full_heads * splits, 0, 1
        head = tl.load(heads + full_heads + store)
        slots = sink + recent
        base = (batch * streaming_heads + store) * slots * DIM
        keys, values = recent_key + base, recent_value + base
        slot = tl.where(past < sink, past, sink + (past - sink) % recent)
        first, last = past * 0, tl.minimum(past, slots)
    else:
        store, split, parts = program // splits, program % splits, splits
        head = tl.load(heads + store)
        slots = capacity
        base = (batch * full_heads + store) * slots * DIM
        keys, values = full_key + base, full_value + base
        slot = past
        share = tl.cdiv(tl.cdiv(past, splits), BLOCK) * BLOCK
        first = split * share
        last = tl.minimum(first + share, past)

    rows, columns = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    in_head = columns < DIM
    query_pointers = query + batch * query_batch + (head * GROUP + rows[:, None]) * query_head + columns[None, :]
    queries = tl.load(query_pointers, (rows[:, None] < GROUP) & in_head[None, :], 0.0)
    new_key = tl.load(key + batch * key_batch + head * key_head + columns, in_head, 0.0)
    new_value = tl.load(value + batch * value_batch + head * value_head + columns, in_head, 0.0)
    new_scores = tl.sum(queries.to(tl.float32) * new_key.to(tl.float32)[None, :], 1) * scale
    row_max = tl.where(split == 0, new_scores, FAR_BELOW)
    total = tl.where(split == 0, 1.0, tl.zeros([ROWS], tl.float32))
    out = tl.where(split == 0, new_value.to(tl.float32)[None, :], tl.zeros([ROWS, COLUMNS], tl.float32))
    for start in range(first, last, BLOCK):
        slots_read = start + tl.arange(0, BLOCK)
        visible = (slots_read < last) & (slots_read != slot)
        offsets = slots_read.to(tl.int64)[:, None] * DIM + columns[None, :]
        block_keys = tl.load(keys + offsets, visible[:, None] & in_head[None, :], 0.0)
        block_values = tl.load(values + offsets, visible[:, None] & in_head[None, :], 0.0)
        row_max, total, out = fold(
            queries, block_keys, block_values, visible[None, :], row_max, total, out, scale, True, PRECISION
        )
    if (split == 0) & (slot < slots):
        tl.store(keys + slot.to(tl.int64) * DIM + columns, new_key, in_head)
        tl.store(values + slot.to(tl.int64) * DIM + columns, new_value, in_head)

    target = output + (batch * (full_heads + streaming_heads) + head) * GROUP * DIM
    inside = (rows[:, None] < GROUP) & in_head[None, :]
    if parts == 1:
        normalised = out / total[:, None]
        tl.store(target + rows[:, None] * DIM + columns[None, :], normalised.to(output.dtype.element_ty), inside)
    else:
        # Each part is GROUP rows of DIM sums, then GROUP totals and GROUP maxima.
        number = batch * full_heads + store
        size = GROUP * (DIM + 2)
        own_part = partial + (number * splits + split) * size
        tl.store(own_part + rows[:, None] * DIM + columns[None, :], out, inside)
        tl.store(own_part + GROUP * DIM + rows, total, rows < GROUP)
        tl.store(own_part + GROUP * (DIM + 1) + rows, row_max, rows < GROUP)
        tl.debug_barrier()
        if tl.atomic_add(arrived + number, 1, sem="acq_rel") == splits - 1:
            tl.store(arrived + number, 0)
            for row in tl.static_range(GROUP):
                summed, weight = tl.zeros([COLUMNS], tl.float32), tl.zeros([1], tl.float32)
                highest = tl.full([1], FAR_BELOW, tl.float32)
                for part_start in range(0, splits, TILE):
                    part = part_start + tl.arange(0, TILE)
                    others = partial + (number * splits + part) * size
                    totals = tl.load(others + GROUP * DIM + row, part < splits, 0.0, cache_modifier=".cg")
                    maxima = tl.load(others + GROUP * (DIM + 1) + row, part < splits, FAR_BELOW, cache_modifier=".cg")
                    sums = tl.load(
                        others[:, None] + row * DIM + columns[None, :],
                        (part < splits)[:, None] & in_head[None, :], 0.0, cache_modifier=".cg",
                    )  # fmt: skip
                    top = tl.maximum(highest, tl.max(maxima, 0))
                    factors = tl.exp2(maxima - top)
                    rescale = tl.exp2(highest - top)
                    summed = summed * rescale + tl.sum(sums * factors[:, None], 0)
                    weight = weight * rescale + tl.sum(totals * factors, 0)
                    highest = top
                tl.store(target + row * DIM + columns, (summed / weight).to(output.dtype.element_ty), in_head)


@triton.jit
def _stream(  # type: ignore[no-untyped-def]
    query, key, value, recent_key, recent_value, heads, output, scale, past, tokens, sink, recent, streaming_heads,
    query_batch, query_head, query_token, key_batch, key_head, key_token, value_batch, value_head, value_token,
    output_batch, output_head, output_token,
    GROUP: tl.constexpr, DIM: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One program for each block of queries of a query head, over the stored slots it sees, then the chunk's keys."""
    begin = tl.program_id(0) * ROWS
    store, member, batch = tl.program_id(1) // GROUP, tl.program_id(1) % GROUP, tl.program_id(2).to(tl.int64)
    head = tl.load(heads + store).to(tl.int64)
    columns = tl.arange(0, COLUMNS)
    in_head = columns[None, :] < DIM
    row = begin + tl.arange(0, ROWS)
    at = query + batch * query_batch + (head * GROUP + member) * query_head
    queries = tl.load(
        at + row.to(tl.int64)[:, None] * query_token + columns[None, :], (row[:, None] < tokens) & in_head, 0.0
    )
    position = past + row
    row_max = tl.full([ROWS], FAR_BELOW, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    out = tl.zeros([ROWS, COLUMNS], tl.float32)

    slots = sink + recent
    base = (batch * streaming_heads + store) * slots * DIM
    used = tl.minimum(past, tl.where(begin + 1 < recent, slots, sink))
    for start in range(0, used, BLOCK):
        slot = start + tl.arange(0, BLOCK)
        offsets = base + slot.to(tl.int64)[:, None] * DIM + columns[None, :]
        inside = (slot[:, None] < used) & in_head
        block_keys = tl.load(recent_key + offsets, inside, 0.0)
        block_values = tl.load(recent_value + offsets, inside, 0.0)
        stored = tl.where(slot < sink, slot, past - 1 - (past - 1 - slot) % recent)  # the position that a slot holds
        near = (slot[None, :] < sink) | (position[:, None] - stored[None, :] < recent)
        visible = (slot[None, :] < used) & near
        row_max, total, out = fold(
            queries, block_keys, block_values, visible, row_max, total, out, scale, True, PRECISION
        )

    keys, values = key + batch * key_batch + head * key_head, value + batch * value_batch + head * value_head
    nearest = tl.maximum(begin - recent + 1, 0) // BLOCK * BLOCK  # the first block that a window reaches into
    end = tl.minimum(begin + ROWS, tokens)
    sinks = tl.cdiv(tl.minimum(tl.maximum(sink - past, 0), nearest), BLOCK)  # blocks before that hold sink tokens
    blocks = sinks + tl.cdiv(end - nearest, BLOCK)
    for number in range(0, blocks):
        start = tl.where(number < sinks, number * BLOCK, nearest + (number - sinks) * BLOCK)
        token = start + tl.arange(0, BLOCK)
        inside = (token[:, None] < end) & in_head
        block_keys = tl.load(keys + token.to(tl.int64)[:, None] * key_token + columns[None, :], inside, 0.0)
        block_values = tl.load(values + token.to(tl.int64)[:, None] * value_token + columns[None, :], inside, 0.0)
        near = (past + token[None, :] < sink) | (row[:, None] - token[None, :] < recent)
        visible = (token[None, :] <= row[:, None]) & (token[None, :] < end) & near
        row_max, total, out = fold(
            queries, block_keys, block_values, visible, row_max, total, out, scale, True, PRECISION
        )

    at = output + batch * output_batch + (head * GROUP + member) * output_head
    at += row.to(tl.int64)[:, None] * output_token + columns[None, :]
    tl.store(at, (out / total[:, None]).to(output.dtype.element_ty), (row[:, None] < tokens) & in_head)


def decode(
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
    window: Window,
    scale: float,
    **tuning: int,
) -> Tensor:
    """The decode step of `duo_id.attention.decode.decode_attention`, in one launch; the same arguments and result."""
    batch, query_heads, _, dim = query.shape
    full_heads, streaming_heads = full_key.shape[1], recent_key.shape[1]
    group = query_heads // (full_heads + streaming_heads)
    out = torch.empty(batch, query_heads, 1, dim, dtype=query.dtype, device=query.device)
    launch = DECODE_TUNING | tuning
    free = _multiprocessors(query.device) - triton.cdiv(batch * streaming_heads, STREAMS_PER_SM)
    splits = max(1, free // max(1, batch * full_heads))
    partial = torch.empty(batch * full_heads * splits * group * (dim + 2), dtype=torch.float32, device=query.device)
    _decode[(streaming_heads + full_heads * splits, batch)](
        query, key, value, full_key, full_value, recent_key, recent_value, heads, lengths, arrived, partial, out,
        scale * LOG2_E, query.stride(0), query.stride(1), key.stride(0), key.stride(1), value.stride(0),
        value.stride(1), full_key.shape[2], window.sink_size, window.recent_size, full_heads, streaming_heads, splits,
        GROUP=group, ROWS=max(16, triton.next_power_of_2(group)), DIM=dim, COLUMNS=padded_dim(dim),
        BLOCK=_fit(launch["block"], query), TILE=32, num_warps=launch["warps"], num_stages=launch["stages"],
        PRECISION=precision(query),
    )  # fmt: skip
    return out


def stream(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    recent_key: Tensor,
    recent_value: Tensor,
    heads: Tensor,
    past: int,
    window: Window,
    scale: float,
    out: Tensor,
    **tuning: int,
) -> None:
    """Attention of the streaming heads for a chunk of tokens, written to their rows of `out`.

    Args:
        query: (batch, query heads, tokens, head_dim); like all tensors here, its last dimension is contiguous.
        key: (batch, KV heads, tokens, head_dim), the chunk's own keys, of all heads.
        value: (batch, KV heads, tokens, head_dim).
        recent_key: (batch, streaming heads, sink + recent, head_dim), what the streaming heads keep of the past.
        recent_value: the same shape.
        heads: (streaming heads,) int32, the KV heads that stream.
        past: tokens before the chunk, the same in each sample.
        window: what streaming heads see.
        scale: factor on the scores.
        out: (batch, query heads, tokens, head_dim), written only at the streaming heads.
        tuning: launch settings that override the default.
    """
    batch, query_heads, tokens, dim = query.shape
    group = query_heads // key.shape[1]
    launch = STREAM_TUNING | tuning
    rows = _fit(launch["rows"], query)
    _stream[(triton.cdiv(tokens, rows), len(heads) * group, batch)](
        query, key, value, recent_key, recent_value, heads, out, scale * LOG2_E, past, tokens, window.sink_size,
        window.recent_size, len(heads), *query.stride()[:3], *key.stride()[:3], *value.stride()[:3], *out.stride()[:3],
        GROUP=group, DIM=dim, COLUMNS=padded_dim(dim), ROWS=rows, BLOCK=min(rows, launch["block"]),
        num_warps=launch["warps"], num_stages=launch["stages"], PRECISION=precision(query),
    )  # fmt: skip


def padded_dim(dim: int) -> int:
    """The width of a head as kernels see it: a power of 2, at least 16."""
    return max(16, triton.next_power_of_2(dim))


def _fit(block: int, query: Tensor) -> int:
    """The largest block, up to `block`, whose keys take no more than `TILE_BYTES`."""
    return max(16, min(block, TILE_BYTES // (padded_dim(query.shape[-1]) * query.element_size())))


def precision(query: Tensor) -> str:
    """How products are computed: float32 at full precision, not rounded to TF32."""
    return "ieee" if query.dtype == torch.float32 else "tf32"


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":  # Triton's interpreter
        return 4
    return torch.cuda.get_device_properties(device).multi_processor_count
