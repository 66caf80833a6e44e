"""The Triton kernels of attention over block tables: one launch for a batch of decode steps and chunks of prompts.

A cache is (blocks, KV heads, block_size, 2 * head_dim), a token's key and then its value, which alone are contiguous. A
block table names the block of each `block_size` tokens of a request. Blocks that no query sees are not read, and their
entries may be anything.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from duo_id.attention.kernels.decode import multiprocessors, sum_parts
from duo_id.attention.kernels.shared import FAR_BELOW, LOG2_E, fit, fold_scores, padded_dim, precision

# "block": keys read at a time; "programs": of all single queries, for each multiprocessor; "least": blocks that one of
# them reads, at least; "rows": queries of a program of a chunk, times the query heads of a KV head.
SINGLE_TUNING = {"block": 64, "programs": 4, "least": 4, "rows": 16, "warps": 4, "stages": 3}
MIXED_TUNING = SINGLE_TUNING | {"rows": 128, "warps": 8}
EXACT_TUNING = SINGLE_TUNING | {"block": 16, "least": 16}  # float32, whose products take many registers
WHOLE = 1 << 30  # tokens: the window of a head that sees all
STORED = 16  # tokens that one program stores


class Workspace(NamedTuple):
    """Where programs that share a KV head of a request leave their parts; launches on one stream can share it.

    Attributes:
        arrived: (requests * KV heads,) int32 zeros, zero again after a launch: counts the programs that have finished.
        partial: float32, the parts.
    """

    arrived: Tensor
    partial: Tensor


@triton.jit
def _attend(  # type: ignore[no-untyped-def]
    queries, position, cache, blocks, number, last, held, oldest, end, sink, recent, scale, cap, cache_block,
    cache_token, ROWS: tl.constexpr, DIM: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
    SIZE: tl.constexpr, SINGLE: tl.constexpr, CAPPED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Running softmax over tokens, the first `held`, then `oldest` to `end`: their blocks from `number` to `last`."""
    columns = tl.arange(0, COLUMNS)[None, :]
    row_max = tl.full([ROWS], FAR_BELOW, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    out = tl.zeros([ROWS, COLUMNS], tl.float32)
    sinks = tl.cdiv(held, BLOCK)
    for current in range(number, last):
        in_sink = current < sinks
        token = tl.where(in_sink, current * BLOCK, oldest + (current - sinks) * BLOCK) + tl.arange(0, BLOCK)
        here = token < tl.where(in_sink, held, end)
        block = tl.load(blocks + token // SIZE, here, 0).to(tl.int64)
        at = cache + (block * cache_block + (token % SIZE) * cache_token)[:, None] + columns
        keys = tl.load(at, here[:, None] & (columns < DIM), 0.0)
        values = tl.load(at + DIM, here[:, None] & (columns < DIM), 0.0)
        scores = tl.dot(queries, tl.trans(keys), input_precision=PRECISION) * scale
        if CAPPED:
            scores = cap * (1.0 - 2.0 / (1.0 + tl.exp2(scores)))  # cap * tanh
        visible = here[None, :]
        if not SINGLE:
            near = (token[None, :] < sink) | (position[:, None] - token[None, :] < recent)
            visible = visible & near & (token[None, :] <= position[:, None])
        scores = tl.where(visible, scores, float("-inf"))
        row_max, total, out = fold_scores(scores, values, row_max, total, out, PRECISION)
    return row_max, total, out


@triton.jit
def _single(  # type: ignore[no-untyped-def]
    program, head, query, cache, table, starts, lengths, arrived, partial, output, scale, cap, splits, sink, recent,
    query_token, query_head, cache_block, cache_head, cache_token, table_row, output_token,
    GROUP: tl.constexpr, DIM: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    SIZE: tl.constexpr, LEAST: tl.constexpr, TILE: tl.constexpr, CAPPED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One of up to `splits` programs for a KV head of a request with a single query; the last to finish sums up."""
    request, split = program // splits, program % splits
    first = tl.load(starts + request).to(tl.int64)
    count = tl.load(starts + request + 1) - first
    end = tl.load(lengths + request)
    held = tl.minimum(sink, end)
    oldest = tl.maximum(end - recent, held)
    blocks = tl.cdiv(held, BLOCK) + tl.cdiv(end - oldest, BLOCK)
    share = tl.maximum(tl.cdiv(blocks, splits), LEAST)
    parts = tl.cdiv(blocks, share)
    if (count == 1) & (split < parts):
        rows, columns = tl.arange(0, ROWS)[:, None], tl.arange(0, COLUMNS)[None, :]
        inside = (rows < GROUP) & (columns < DIM)
        at = query + first * query_token + (head * GROUP + rows) * query_head + columns
        queries = tl.load(at, inside, 0.0)
        row_max, total, out = _attend(
            queries, rows, cache + head * cache_head, table + request * table_row, split * share,
            tl.minimum(split * share + share, blocks), held, oldest, end, sink, recent, scale, cap, cache_block,
            cache_token, ROWS, DIM, COLUMNS, BLOCK, SIZE, True, CAPPED, PRECISION,
        )  # fmt: skip
        target = output + first * output_token + head * GROUP * DIM
        if parts == 1:
            normalised = (out / total[:, None]).to(output.dtype.element_ty)
            tl.store(target + rows * DIM + columns, normalised, inside)
        else:
            place = request * tl.num_programs(1) + head
            own = partial + (place.to(tl.int64) * splits + split) * GROUP * (DIM + 2)
            row = tl.arange(0, ROWS)
            tl.store(own + rows * DIM + columns, out, inside)
            tl.store(own + GROUP * DIM + row, total, row < GROUP)
            tl.store(own + GROUP * (DIM + 1) + row, row_max, row < GROUP)
            all_parts = partial + place.to(tl.int64) * splits * GROUP * (DIM + 2)
            sum_parts(all_parts, parts, arrived + place, target, GROUP, DIM, COLUMNS, TILE)


@triton.jit
def _chunk(  # type: ignore[no-untyped-def]
    tile, head, query, cache, table, starts, lengths, output, scale, cap, requests, sink, recent, query_token,
    query_head, cache_block, cache_head, cache_token, table_row, output_token,
    GROUP: tl.constexpr, DIM: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    SIZE: tl.constexpr, SEARCH: tl.constexpr, CAPPED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile of queries of one request and one KV head.

    Request r has the tiles from starts[r] // QUERIES + r on: a bound that needs no sum over the requests before.
    """
    QUERIES: tl.constexpr = ROWS // GROUP
    request = -1
    for base in range(0, requests, SEARCH):
        others = base + tl.arange(0, SEARCH)
        firsts = tl.load(starts + others, others < requests, 0) // QUERIES + others
        request += tl.sum(((others < requests) & (firsts <= tile)).to(tl.int32), 0)
    start = tl.load(starts + request)
    count = tl.load(starts + request + 1) - start
    length = tl.load(lengths + request)
    begin = (tile - start // QUERIES - request) * QUERIES
    if (count > 1) & (begin < count):
        row, columns = tl.arange(0, ROWS), tl.arange(0, COLUMNS)[None, :]
        number = begin + row // GROUP
        inside = ((row // GROUP < QUERIES) & (number < count))[:, None] & (columns < DIM)
        token = (start + number).to(tl.int64)[:, None]
        heads = (head * GROUP + row % GROUP)[:, None]
        queries = tl.load(query + token * query_token + heads * query_head + columns, inside, 0.0)
        first = length - count + begin
        end = tl.minimum(first + QUERIES, length)
        held = tl.minimum(sink, end)
        oldest = tl.maximum(first - recent + 1, held)
        _, total, out = _attend(
            queries, length - count + number, cache + head * cache_head, table + request * table_row, 0,
            tl.cdiv(held, BLOCK) + tl.cdiv(end - oldest, BLOCK), held, oldest, end, sink, recent, scale, cap,
            cache_block, cache_token, ROWS, DIM, COLUMNS, BLOCK, SIZE, False, CAPPED, PRECISION,
        )  # fmt: skip
        normalised = (out / total[:, None]).to(output.dtype.element_ty)
        tl.store(output + token * output_token + heads * DIM + columns, normalised, inside)


@triton.jit(do_not_specialize=["requests", "tiles", "splits"])  # they change from step to step
def _paged(  # type: ignore[no-untyped-def]
    query, cache, table, starts, lengths, arrived, partial, output, scale, cap, requests, tiles, splits, sink, recent,
    query_token, query_head, cache_block, cache_head, cache_token, table_row, output_token,
    GROUP: tl.constexpr, DIM: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr, CHUNK_ROWS: tl.constexpr,
    BLOCK: tl.constexpr, SIZE: tl.constexpr, LEAST: tl.constexpr, TILE: tl.constexpr, SEARCH: tl.constexpr,
    CHUNKS: tl.constexpr, CAPPED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`tiles` programs for the chunks of prompts, the last tokens first, then `splits` for each request."""
    program, head = tl.program_id(0), tl.program_id(1)
    single = program
    if CHUNKS:
        single = program - tiles
        if program < tiles:
            _chunk(
                tiles - 1 - program, head, query, cache, table, starts, lengths, output, scale, cap, requests, sink,
                recent, query_token, query_head, cache_block, cache_head, cache_token, table_row, output_token,
                GROUP, DIM, COLUMNS, CHUNK_ROWS, BLOCK, SIZE, SEARCH, CAPPED, PRECISION,
            )  # fmt: skip
    if single >= 0:
        _single(
            single, head, query, cache, table, starts, lengths, arrived, partial, output, scale, cap, splits, sink,
            recent, query_token, query_head, cache_block, cache_head, cache_token, table_row, output_token,
            GROUP, DIM, COLUMNS, ROWS, BLOCK, SIZE, LEAST, TILE, CAPPED, PRECISION,
        )  # fmt: skip


def paged_attention(
    query: Tensor,
    cache: Tensor,
    table: Tensor,
    starts: Tensor,
    lengths: Tensor,
    out: Tensor,
    scale: float,
    sink_size: int = 0,
    recent_size: int | None = None,
    softcap: float | None = None,
    longest: int | None = None,
    space: Workspace | None = None,
    **tuning: int,
) -> None:
    """Attention of a batch of requests over their cached keys and values, in one launch, written to `out`.

    The queries of a request are its last tokens, whose keys the cache holds already. The launch depends on shapes and
    settings alone, so that a CUDA graph can replay it over other contents of the tensors.

    Args:
        query: (at least tokens, query heads, head_dim); like all tensors here, its last dimension is contiguous.
        cache: (blocks, KV heads, block_size, 2 * head_dim).
        table: (at least requests, blocks of the longest) int32, the block of each `block_size` tokens.
        starts: (requests + 1,) int32, where each request's queries begin in the batch, and the end of the last one's.
        lengths: (at least requests,) int32, tokens of each request's context, with the new ones.
        out: the shape of `query`, contiguous but for its tokens; what is not a token of a request stays as it is.
        scale: factor on the scores.
        sink_size: first tokens that every query sees.
        recent_size: latest tokens that a query sees, with its own; None: all.
        softcap: see `duo_id.attention.softmax.Softmax`.
        longest: the most queries that a request can have; None: any number.
        space: as `workspace` makes it; None: memory of its own.
        tuning: launch settings that override the default.
    """
    requests, kv_heads, (heads, dim) = len(starts) - 1, cache.shape[1], query.shape[1:]
    group, size = heads // kv_heads, cache.shape[2]
    assert out.stride()[1:] == (dim, 1)
    chunks = longest != 1
    usual = MIXED_TUNING if chunks else SINGLE_TUNING
    launch = (EXACT_TUNING if query.dtype == torch.float32 else usual) | tuning
    block, rows = fit(launch["block"], query), max(16, triton.next_power_of_2(group))
    chunk_rows = max(rows, fit(launch["rows"], query))
    tiles = query.shape[0] // (chunk_rows // group) + requests if chunks else 0
    recent, most = WHOLE if recent_size is None else recent_size, table.shape[1] * size
    seen = most if recent_size is None else min(sink_size + recent_size, most)
    least = launch["least"]
    splits = splits_of(requests * kv_heads, triton.cdiv(seen, block * least), launch["programs"], query.device)
    if space is None:
        space = workspace(requests, kv_heads, group, dim, query.device, launch["programs"])
    assert space.partial.numel() >= requests * kv_heads * splits * group * (dim + 2)
    assert space.arrived.numel() >= requests * kv_heads
    capped = softcap is not None
    factor = 2 * scale / softcap if softcap else scale
    _paged[(tiles + requests * splits, kv_heads)](
        query, cache, table, starts, lengths, *space, out, factor * LOG2_E, (softcap or 0.0) * LOG2_E, requests, tiles,
        splits, sink_size, recent, *query.stride()[:2], *cache.stride()[:3], table.stride(0), out.stride(0),
        GROUP=group, DIM=dim, COLUMNS=padded_dim(dim), ROWS=rows, CHUNK_ROWS=chunk_rows, BLOCK=block, SIZE=size,
        LEAST=least, TILE=32, SEARCH=128, CHUNKS=chunks, CAPPED=capped, PRECISION=precision(query),
        num_warps=launch["warps"], num_stages=launch["stages"],
    )  # fmt: skip


def splits_of(heads: int, most: int, programs: int, device: torch.device) -> int:
    """How many programs may share a KV head of a request.

    Args:
        heads: KV heads of all requests.
        most: programs for the longest context that there can be.
        programs: for each multiprocessor.
        device: where they run.
    """
    return max(1, min(most, programs * multiprocessors(device) // max(1, heads)))


def workspace(
    requests: int, kv_heads: int, group: int, dim: int, device: torch.device, programs: int = SINGLE_TUNING["programs"]
) -> Workspace:
    """The workspace of launches with up to `requests` requests, and `group` query heads of width `dim` a KV head."""
    parts = max(programs * multiprocessors(device), requests * kv_heads)
    arrived = torch.zeros(requests * kv_heads, dtype=torch.int32, device=device)
    return Workspace(arrived, torch.empty(parts * group * (dim + 2), dtype=torch.float32, device=device))


@triton.jit(do_not_specialize=["tokens"])
def _store(  # type: ignore[no-untyped-def]
    key, value, cache, slots, tokens, key_token, key_head, value_token, value_head, cache_block, cache_head,
    cache_token, DIM: tl.constexpr, COLUMNS: tl.constexpr, SIZE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    token, head = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.program_id(1)
    columns = tl.arange(0, COLUMNS)[None, :]
    slot = tl.load(slots + token, token < tokens, -1).to(tl.int64)
    inside = (slot >= 0)[:, None] & (columns < DIM)
    row = token.to(tl.int64)[:, None]
    at = cache + head * cache_head + (slot // SIZE * cache_block + slot % SIZE * cache_token)[:, None] + columns
    keys = tl.load(key + row * key_token + head * key_head + columns, inside, 0.0)
    values = tl.load(value + row * value_token + head * value_head + columns, inside, 0.0)
    tl.store(at, keys.to(cache.dtype.element_ty), inside)
    tl.store(at + DIM, values.to(cache.dtype.element_ty), inside)


def store(cache: Tensor, key: Tensor, value: Tensor, slots: Tensor) -> None:
    """Store the new tokens of a batch.

    Args:
        cache: (blocks, KV heads, block_size, 2 * head_dim).
        key: (at least tokens, KV heads, head_dim).
        value: the same shape.
        slots: (tokens,) block * block_size + offset of each; -1: not a token.
    """
    _, heads, dim = key.shape
    _store[(triton.cdiv(len(slots), STORED), heads)](
        key, value, cache, slots, len(slots), *key.stride()[:2], *value.stride()[:2], *cache.stride()[:3],
        DIM=dim, COLUMNS=padded_dim(dim), SIZE=cache.shape[2], ROWS=STORED, num_warps=4,
    )  # fmt: skip
