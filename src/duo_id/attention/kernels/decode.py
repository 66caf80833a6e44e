"""The Triton kernel of a decode step under a head mask: one launch for all heads of a layer.

It reads and writes the stores of `duo_id.deploy` in place, full ones and rings of any sizes.
"""

import functools
import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from duo_id.attention.kernels.shared import FAR_BELOW, LOG2_E, fit, fold, padded_dim, precision

DECODE_TUNING = {"block": 128, "warps": 4, "stages": 3}  # on an H200; see docs/performance.md
STREAMS_PER_SM = 4  # next to long retrieval heads, one multiprocessor handles this many (short) streaming heads
SHARE = 512, 2048  # slots of a streaming head that one program reads, at least and at most


@triton.jit
def ring_of(program, batch, streaming, streaming_heads, sink, most, full_programs, ring_share, HEADS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Which streaming head a program belongs to, as which of how many, and where the first of these has its part."""
    store, split, parts, part = program - full_programs, 0, 1, batch * 0
    if HEADS:
        number = tl.arange(0, HEADS)
        windows = tl.load(streaming + 2 * streaming_heads + number, number < streaming_heads, 0) + sink
        programs = tl.cdiv(tl.minimum(windows, most), ring_share)
        programs = tl.where(number < streaming_heads, programs, 0)
        ends = tl.cumsum(programs, 0)
        own = (ends - programs <= store) & (store < ends)
        split = store - tl.sum(tl.where(own, ends - programs, 0), 0)
        parts = tl.sum(tl.where(own, programs, 0), 0)
        part = tl.num_programs(1) * full_programs + batch * (tl.num_programs(0) - full_programs) + store - split
        store = tl.sum(tl.where(own, number, 0), 0)
    return store, split, parts, part


@triton.jit
def ragged_head_of(program, past, places, full_heads, programs, HEADS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Which retrieval head a program belongs to, as which of how many, if heads share `programs` by their lengths.

    Each has one program, and of the others as many as its share of all tokens; last, the first of its programs.
    """
    number = tl.arange(0, HEADS)
    inside = number < full_heads
    used = tl.where(inside, past + 1 - tl.load(places + 2 * full_heads + number, inside, 0), 0)
    ends, total = tl.cumsum(used, 0), tl.sum(used, 0)
    firsts = (number + (ends - used) * (programs - full_heads) // total).to(tl.int32)
    lasts = (number + 1 + ends * (programs - full_heads) // total).to(tl.int32)
    own = (firsts <= program) & (program < lasts) & inside
    first = tl.sum(tl.where(own, firsts, 0), 0)
    return tl.sum(tl.where(own, number, 0), 0), program - first, tl.sum(tl.where(own, lasts, 0), 0) - first, first


@triton.jit
def sum_parts(  # type: ignore[no-untyped-def]
    partial, parts, place, target, GROUP: tl.constexpr, DIM: tl.constexpr, COLUMNS: tl.constexpr, TILE: tl.constexpr
):
    """Called by each program of a head with its part stored: the last one sums all parts.

    Each part is GROUP rows of DIM sums, then GROUP totals and GROUP maxima.
    """
    columns = tl.arange(0, COLUMNS)
    in_head = columns < DIM
    tl.debug_barrier()
    if tl.atomic_add(place, 1, sem="acq_rel") == parts - 1:
        tl.store(place, 0)
        for row in tl.static_range(GROUP):
            summed, weight = tl.zeros([COLUMNS], tl.float32), tl.zeros([1], tl.float32)
            highest = tl.full([1], FAR_BELOW, tl.float32)
            for tile in range(0, parts, TILE):
                other = tile + tl.arange(0, TILE)
                others = partial + other * GROUP * (DIM + 2)
                totals = tl.load(others + GROUP * DIM + row, other < parts, 0.0, cache_modifier=".cg")
                maxima = tl.load(others + GROUP * (DIM + 1) + row, other < parts, FAR_BELOW, cache_modifier=".cg")
                sums = tl.load(
                    others[:, None] + row * DIM + columns[None, :],
                    (other < parts)[:, None] & in_head[None, :], 0.0, cache_modifier=".cg",
                )  # fmt: skip
                top = tl.maximum(highest, tl.max(maxima, 0))
                factors = tl.exp2(maxima - top)
                rescale = tl.exp2(highest - top)
                summed = summed * rescale + tl.sum(sums * factors[:, None], 0)
                weight = weight * rescale + tl.sum(totals * factors, 0)
                highest = top
            tl.store(target + row * DIM + columns, (summed / weight).to(target.dtype.element_ty), in_head)


@triton.jit(do_not_specialize=["dropped"])
def _decode(  # type: ignore[no-untyped-def]
    query, key, value, full_key, full_value, recent_key, recent_value, retrieval, places, streaming, lengths, arrived,
    partial, output, scale, query_batch, query_head, key_batch, key_head, value_batch, value_head, capacity, stored,
    sink, most, dropped, full_heads, streaming_heads, splits, ring_share,
    GROUP: tl.constexpr, ROWS: tl.constexpr, DIM: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
    TILE: tl.constexpr, HEADS: tl.constexpr, RAGGED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`splits` programs for each retrieval head, along its past, then one for every `ring_share` slots of the others.

    The first program of a head stores its new token; the last one to finish a head sums its parts. `HEADS` is 0 if each
    streaming head has one program, else a power of 2 that is not below their number. `RAGGED` is 0 if all retrieval
    heads keep equally many tokens, else a power of 2 that is not below their number, and these share their programs.
    """
    program, batch = tl.program_id(0), tl.program_id(1).to(tl.int64)
    past = tl.load(lengths + batch) - 1  # lengths include the new token
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
    elif RAGGED:
        own = places + batch * 3 * full_heads
        store, split, parts, part = ragged_head_of(program, past, own, full_heads, full_heads * splits, RAGGED)
        part += batch * full_heads * splits
        head = tl.load(retrieval + store)
        slots, past = tl.load(own + full_heads + store), past - tl.load(own + 2 * full_heads + store)
        base = (batch * capacity + tl.load(own + store)) * DIM
        keys, values = full_key + base, full_value + base
        slot = past
    else:
        store, split, parts = program // splits, program % splits, splits
        part = (batch * full_heads + store) * splits
        head = tl.load(retrieval + store)
        slots, past = capacity, past - dropped
        base = (batch * full_heads + store) * slots * DIM
        keys, values = full_key + base, full_value + base
        slot = past
    used = tl.minimum(past, slots)
    share = tl.cdiv(tl.cdiv(used, parts), BLOCK) * BLOCK
    first = split * share
    last = tl.minimum(first + share, used)

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
        own_part = partial + (part + split) * GROUP * (DIM + 2)
        tl.store(own_part + rows[:, None] * DIM + columns[None, :], out, inside)
        tl.store(own_part + GROUP * DIM + rows, total, rows < GROUP)
        tl.store(own_part + GROUP * (DIM + 1) + rows, row_max, rows < GROUP)
        place = arrived + batch * (full_heads + streaming_heads) + head
        sum_parts(partial + part * GROUP * (DIM + 2), parts, place, target, GROUP, DIM, COLUMNS, TILE)


def decode(
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
    slots: Sequence[int],
    sink_size: int,
    scale: float,
    dropped: int = 0,
    places: Tensor | None = None,
    **tuning: int,
) -> Tensor:
    """The decode step of `duo_id.attention.decode.decode_attention`, in one launch; the same arguments and result."""
    batch, query_heads, _, dim = query.shape
    full_heads, group, capacity = len(retrieval), query_heads // key.shape[1], full_key.shape[-2]
    longest = capacity if places is None else triton.cdiv(capacity, full_heads)  # on average, as they share programs
    out = torch.empty(batch, query_heads, 1, dim, dtype=query.dtype, device=query.device)
    launch = DECODE_TUNING | tuning
    processors = multiprocessors(query.device)
    splits, share, rings = programs_of(tuple(slots), longest, full_heads, batch, processors)
    split_rings = rings > len(slots)
    parts = batch * (full_heads * splits + (rings if split_rings else 0))
    partial = torch.empty(parts * group * (dim + 2), dtype=torch.float32, device=query.device)
    listed = retrieval, retrieval if places is None else places, streaming
    _decode[(full_heads * splits + rings, batch)](
        query, key, value, full_key, full_value, recent_key, recent_value, *listed, lengths, arrived, partial,
        out, scale * LOG2_E, query.stride(0), query.stride(1), key.stride(0), key.stride(1), value.stride(0),
        value.stride(1), capacity, recent_key.shape[1], sink_size, max(slots, default=0), dropped,
        full_heads, len(slots), splits, share,
        GROUP=group, ROWS=max(16, triton.next_power_of_2(group)), DIM=dim, COLUMNS=padded_dim(dim),
        BLOCK=fit(launch["block"], query), TILE=32,
        HEADS=max(16, triton.next_power_of_2(len(slots))) if split_rings else 0,
        RAGGED=0 if places is None else max(16, triton.next_power_of_2(full_heads)),
        num_warps=launch["warps"], num_stages=launch["stages"], PRECISION=precision(query),
    )  # fmt: skip
    return out


@functools.lru_cache(maxsize=1024)
def programs_of(
    slots: tuple[int, ...], capacity: int, full_heads: int, batch: int, multiprocessors: int
) -> tuple[int, int, int]:
    """How many programs share a retrieval head, how many slots of a streaming head one reads, and how many read those.

    Retrieval heads get as many programs as streaming heads leave multiprocessors. Of these, a short head takes
    1/STREAMS_PER_SM, a longer one as many as it keeps busy while a program of a retrieval head runs.
    """
    least, most = SHARE
    for splits in range(multiprocessors // max(1, batch * full_heads), 0, -1):
        share = max(least, triton.cdiv(capacity, splits))
        busy = [0 if size <= least else size / share if size <= share else triton.cdiv(size, share) for size in slots]
        taken = sum(max(1 / STREAMS_PER_SM, part) for part in busy)
        if batch * full_heads * splits + math.ceil(batch * taken) <= multiprocessors:
            break
    else:
        splits, share = 1, most
    share = min(share, most)
    return splits, share, sum(triton.cdiv(size, share) for size in slots)


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """How many multiprocessors a device has."""
    if device.type != "cuda":  # Triton's interpreter
        return 4
    return torch.cuda.get_device_properties(device).multi_processor_count
