"""The Triton kernel of a decode step whose retrieval heads keep codes: one launch for all heads of a layer.

A block is one group of tokens, whose codes become numbers in registers. The scale of a key channel goes into the query
and its zero into a constant, once a block; the scale of a token's value goes into its weight, and all zeros into one
sum. Products have tokens or channels as rows and the few queries of a KV head as columns: so codes are read straight
into the registers in which tensor cores take them. Codes come in two halves of the channels (`duo_id.attention.codes`),
and so does all else.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from duo_id.attention.kernels.codes import HIGH_OFFSET, LOW_OFFSET, numbers, scales_of, write_keys, write_values
from duo_id.attention.kernels.decode import multiprocessors, programs_of, ring_of, sum_parts
from duo_id.attention.kernels.shared import FAR_BELOW, LOG2_E, padded_dim, precision

# "programs": of all retrieval heads, for each multiprocessor; as many have room with so many "registers" a thread, and
# one more would wait for a second round. "block": tokens that are not codes, read at a time.
CODES_TUNING = {"programs": 3, "registers": 168, "warps": 4, "stages": 3, "block": 32}
EIGHT_BITS_TUNING = CODES_TUNING | {"programs": 2, "registers": 255}  # keys and values; on an H200, see docs/lab/log.md


@triton.jit
def weigh(scores, row_max):  # type: ignore[no-untyped-def]
    """One step of the online softmax for scores (tokens, rows): the new maxima, weights, and what earlier sums lose."""
    new_max = tl.maximum(row_max, tl.max(scores, 0))
    return new_max, tl.exp2(scores - new_max[None, :]), tl.exp2(row_max - new_max)[None, :]


@triton.jit
def _decode_codes(  # type: ignore[no-untyped-def]
    query, key, value, key_codes, key_scales, value_codes, value_scales, tail_key, tail_value, recent_key, recent_value,
    retrieval, streaming, lengths, arrived, partial, output, scale, query_batch, query_head, key_batch, key_head,
    value_batch, value_head, groups, stored, sink, most, full_heads, streaming_heads, splits, ring_share,
    GROUP: tl.constexpr, ROWS: tl.constexpr, DIM: tl.constexpr, HALF: tl.constexpr, SIZE: tl.constexpr,
    BLOCK: tl.constexpr, TILE: tl.constexpr, HEADS: tl.constexpr, KEY_BITS: tl.constexpr, VALUE_BITS: tl.constexpr,
    FAST: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`splits` programs for each retrieval head, along its groups, then one for every `ring_share` slots of the others.

    The first program of a head stores its new token; the last of a retrieval head reads the tail, the tokens after the
    last group of codes, and turns it into codes if the new token completes it. SIZE tokens are a group.
    """
    program, batch = tl.program_id(0), tl.program_id(1).to(tl.int64)
    past = tl.load(lengths + batch) - 1  # lengths include the new token
    complete = tl.minimum((past // SIZE).to(tl.int32), groups)
    if program >= full_heads * splits:
        store, split, parts, part = ring_of(
            program, batch, streaming, streaming_heads, sink, most, full_heads * splits, ring_share, HEADS
        )
        head = tl.load(streaming + store)
        recent = tl.load(streaming + 2 * streaming_heads + store)
        slots = sink + recent
        base = (batch * stored + tl.load(streaming + streaming_heads + store)) * DIM
        keys, values = recent_key + base, recent_value + base
        slot = tl.where(past < sink, past, sink + (past - sink) % recent)
        used = tl.minimum(past, slots)
        read_each = tl.cdiv(tl.cdiv(used, parts), BLOCK) * BLOCK
        first = split * read_each
        last = tl.minimum(first + read_each, used)
        first_group, last_group, closes = complete * 0, complete * 0, split < 0
    else:
        store, split, parts = program // splits, program % splits, splits
        part = (batch * full_heads + store) * splits
        head = tl.load(retrieval + store)
        slots = complete * 0 + SIZE
        base = ((batch * full_heads + store) * 2 + complete % 2) * SIZE * DIM
        keys, values = tail_key + base, tail_value + base
        slot = past - complete * SIZE
        first, last = past * 0, tl.where(split == splits - 1, slot, 0)
        groups_each = tl.cdiv(complete, splits)
        first_group = split * groups_each
        last_group = tl.minimum(first_group + groups_each, complete)
        closes = (split == splits - 1) & (slot == SIZE - 1) & (complete < groups)

    rows, half, tokens = tl.arange(0, ROWS), tl.arange(0, HALF), tl.arange(0, SIZE)
    in_half = half < DIM // 2
    inside = (rows[:, None] < GROUP) & in_half[None, :]
    own_query = query + batch * query_batch + (head * GROUP + rows[:, None]) * query_head + half[None, :]
    query_low, query_high = tl.load(own_query, inside, 0.0), tl.load(own_query + DIM // 2, inside, 0.0)
    own_key = key + batch * key_batch + head * key_head
    own_value = value + batch * value_batch + head * value_head
    new_key_low = tl.load(own_key + half, in_half, 0.0)
    new_key_high = tl.load(own_key + DIM // 2 + half, in_half, 0.0)
    new_value_low = tl.load(own_value + half, in_half, 0.0)
    new_value_high = tl.load(own_value + DIM // 2 + half, in_half, 0.0)
    products = query_low.to(tl.float32) * new_key_low.to(tl.float32)[None, :]
    products += query_high.to(tl.float32) * new_key_high.to(tl.float32)[None, :]
    row_max = tl.where(split == 0, tl.sum(products, 1) * scale, FAR_BELOW)
    total = tl.where(split == 0, 1.0, tl.zeros([ROWS], tl.float32))
    nothing = tl.zeros([HALF, ROWS], tl.float32)
    out_low = tl.where(split == 0, new_value_low.to(tl.float32)[:, None], nothing)
    out_high = tl.where(split == 0, new_value_high.to(tl.float32)[:, None], nothing)

    TYPE: tl.constexpr = tl.float16 if FAST else query.dtype.element_ty
    RAISED: tl.constexpr = 64.0 if FAST else 1.0  # weights times scales, or the least would be 0 in float16
    start_group = (batch * full_heads + store) * groups
    totals = tl.zeros([SIZE, ROWS], tl.float32)  # this and the next two are summed after the loop
    zeros, offsets = totals, totals
    out_low, out_high = out_low * RAISED, out_high * RAISED
    wide_low, wide_high = query_low.to(tl.float32) * scale, query_high.to(tl.float32) * scale
    first_max = row_max
    for group in range(first_group, last_group):
        at = start_group + group
        key_scale_low, key_zero_low = scales_of(key_scales + at * 2 * DIM, half, in_half, EVEN, FAST)
        key_scale_high, key_zero_high = scales_of(key_scales + at * 2 * DIM + DIM, half, in_half, EVEN, FAST)
        value_scale, value_zero = scales_of(value_scales + at * 2 * SIZE, tokens, in_half, True, FAST)
        value_scale *= RAISED
        key_low, key_high = numbers(
            key_codes + at * (KEY_BITS // 4 * SIZE * (DIM // 2)) + tokens[:, None] * (DIM // 2) + half[None, :],
            in_half[None, :], SIZE * (DIM // 2), KEY_BITS, EVEN, FAST, TYPE,
        )  # fmt: skip
        value_low, value_high = numbers(
            value_codes + at * (VALUE_BITS // 4 * SIZE * (DIM // 2)) + half[:, None] * SIZE + tokens[None, :],
            in_half[:, None], SIZE * (DIM // 2), VALUE_BITS, EVEN, FAST, TYPE,
        )  # fmt: skip
        scaled_low = (wide_low * key_scale_low[None, :]).to(TYPE)
        scaled_high = (wide_high * key_scale_high[None, :]).to(TYPE)
        products = wide_low * key_zero_low[None, :] + wide_high * key_zero_high[None, :]
        if FAST:
            products -= LOW_OFFSET * scaled_low.to(tl.float32)
            products -= (HIGH_OFFSET if KEY_BITS == 4 else LOW_OFFSET) * scaled_high.to(tl.float32)
        scores = tl.dot(key_low, tl.trans(scaled_low), input_precision=PRECISION)
        scores = tl.dot(key_high, tl.trans(scaled_high), scores, input_precision=PRECISION)
        scores += tl.sum(products, 1)[None, :]
        row_max, weights, rescale = weigh(scores, row_max)
        totals = totals * rescale + weights
        scaled = (weights * value_scale[:, None]).to(TYPE)
        zeros = zeros * rescale + weights * value_zero[:, None]
        if FAST:
            offsets = offsets * rescale + scaled.to(tl.float32)
        out_low = out_low * rescale + tl.dot(value_low, scaled, input_precision=PRECISION)
        out_high = out_high * rescale + tl.dot(value_high, scaled, input_precision=PRECISION)
    total = total * tl.exp2(first_max - row_max) + tl.sum(totals, 0)
    zero = tl.sum(zeros, 0)[None, :]
    out_low, out_high = out_low * (1 / RAISED) + zero, out_high * (1 / RAISED) + zero
    if FAST:
        offset = tl.sum(offsets, 0)[None, :] * (1 / RAISED)
        out_low -= LOW_OFFSET * offset
        out_high -= (HIGH_OFFSET if VALUE_BITS == 4 else LOW_OFFSET) * offset

    for start in range(first, last, BLOCK):
        read = start + tl.arange(0, BLOCK)
        visible = (read < last) & (read != slot)
        at_keys = keys + read.to(tl.int64)[:, None] * DIM + half[None, :]
        at_values = values + read.to(tl.int64)[None, :] * DIM + half[:, None]
        seen_keys, seen_values = visible[:, None] & in_half[None, :], visible[None, :] & in_half[:, None]
        key_low, key_high = tl.load(at_keys, seen_keys, 0.0), tl.load(at_keys + DIM // 2, seen_keys, 0.0)
        value_low, value_high = tl.load(at_values, seen_values, 0.0), tl.load(at_values + DIM // 2, seen_values, 0.0)
        scores = tl.dot(key_low, tl.trans(query_low), input_precision=PRECISION)
        scores = tl.dot(key_high, tl.trans(query_high), scores, input_precision=PRECISION) * scale
        row_max, weights, rescale = weigh(tl.where(visible[:, None], scores, float("-inf")), row_max)
        total = total * tl.sum(rescale, 0) + tl.sum(weights, 0)
        scaled = weights.to(query.dtype.element_ty)
        out_low = tl.dot(value_low, scaled, out_low * rescale, input_precision=PRECISION)
        out_high = tl.dot(value_high, scaled, out_high * rescale, input_precision=PRECISION)

    if closes:
        at = start_group + complete
        write_keys(
            keys, own_key, key_codes + at * (KEY_BITS // 4 * SIZE * (DIM // 2)), key_scales + at * 2 * DIM,
            DIM, SIZE, KEY_BITS,
        )  # fmt: skip
        write_values(
            values, own_value, value_codes + at * (VALUE_BITS // 4 * SIZE * (DIM // 2)), value_scales + at * 2 * SIZE,
            DIM, HALF, SIZE, VALUE_BITS,
        )  # fmt: skip
    if (split == 0) & (slot < slots):
        at_slot = slot.to(tl.int64) * DIM + half
        tl.store(keys + at_slot, new_key_low, in_half)
        tl.store(keys + at_slot + DIM // 2, new_key_high, in_half)
        tl.store(values + at_slot, new_value_low, in_half)
        tl.store(values + at_slot + DIM // 2, new_value_high, in_half)

    target = output + (batch * (full_heads + streaming_heads) + head) * GROUP * DIM
    at_rows = rows[None, :] * DIM + half[:, None]
    inside = (rows[None, :] < GROUP) & in_half[:, None]
    if parts == 1:
        tl.store(target + at_rows, (out_low / total).to(output.dtype.element_ty), inside)
        tl.store(target + at_rows + DIM // 2, (out_high / total).to(output.dtype.element_ty), inside)
    else:
        own_part = partial + (part + split) * GROUP * (DIM + 2)
        tl.store(own_part + at_rows, out_low, inside)
        tl.store(own_part + at_rows + DIM // 2, out_high, inside)
        tl.store(own_part + GROUP * DIM + rows, total, rows < GROUP)
        tl.store(own_part + GROUP * (DIM + 1) + rows, row_max, rows < GROUP)
        place = arrived + batch * (full_heads + streaming_heads) + head
        sum_parts(partial + part * GROUP * (DIM + 2), parts, place, target, GROUP, DIM, 2 * HALF, TILE)


def decode_codes(
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
    slots: Sequence[int],
    sink_size: int,
    scale: float,
    **tuning: int,
) -> Tensor:
    """The decode step of `duo_id.attention.decode_codes`, in one launch; the same arguments and result."""
    batch, query_heads, _, dim = query.shape
    (full_heads, groups), group = key_codes.shape[1:3], query_heads // key.shape[1]
    size = tail_key.shape[2] // 2
    out = torch.empty(batch, query_heads, 1, dim, dtype=query.dtype, device=query.device)
    bits, half = (4 * key_codes.shape[3], 4 * value_codes.shape[3]), padded_dim(dim // 2)
    launch = (EIGHT_BITS_TUNING if bits == (8, 8) else CODES_TUNING) | tuning
    narrow = half * query.element_size() <= 128  # others need more registers and shared memory
    processors = multiprocessors(query.device)
    splits, share, rings = programs_of(tuple(slots), groups * size, full_heads, batch, processors * launch["programs"])
    split_rings = rings > len(slots)
    parts = batch * (full_heads * splits + (rings if split_rings else 0))
    partial = torch.empty(parts * group * (dim + 2), dtype=torch.float32, device=query.device)
    _decode_codes[(full_heads * splits + rings, batch)](
        query, key, value, key_codes, key_scales, value_codes, value_scales, tail_key, tail_value, recent_key,
        recent_value, retrieval, streaming, lengths, arrived, partial, out, scale * LOG2_E, query.stride(0),
        query.stride(1), key.stride(0), key.stride(1), value.stride(0), value.stride(1), groups, recent_key.shape[1],
        sink_size, max(slots, default=0), full_heads, len(slots), splits, share,
        GROUP=group, ROWS=max(8, triton.next_power_of_2(group)), DIM=dim, HALF=half, SIZE=size,
        BLOCK=launch["block"], TILE=32, HEADS=max(16, triton.next_power_of_2(len(slots))) if split_rings else 0,
        KEY_BITS=bits[0], VALUE_BITS=bits[1],
        FAST=query.is_cuda and query.dtype == torch.bfloat16, EVEN=2 * half == dim,
        PRECISION=precision(query),
        num_warps=launch["warps"], num_stages=launch["stages"] if narrow else 2,
        maxnreg=launch["registers"] if narrow else None,
    )  # fmt: skip
    return out
