"""Streaming attention of whole sequences with a backward pass, as Triton kernels: what training needs.

The rows of a block interleave the query heads of one KV head, row r being token r // group of head r % group: keys are
read once for all of them, and a block spans few tokens, so that little outside the windows is computed. Blocks that all
rows see need no mask. Softmax is computed online, in base 2; its log-sum is kept for gradients. Each KV head reads its
own recent size from memory, so that heads of any spans take one launch.
"""

import triton
import triton.language as tl

from duo_id.attention.kernels.shared import FAR_BELOW, fold

LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _load_rows(base, row, end, head, token, columns, GROUP: tl.constexpr, DIM: tl.constexpr):  # type: ignore[no-untyped-def]
    """Rows of queries, outputs or their gradients, (rows, dim); zero from `end` on."""
    offsets = (row // GROUP).to(tl.int64)[:, None] * token + (row % GROUP).to(tl.int64)[:, None] * head
    return tl.load(base + offsets + columns[None, :], (row < end)[:, None] & (columns < DIM)[None, :], 0.0)


@triton.jit
def _store_rows(base, values, row, end, head, token, columns, GROUP: tl.constexpr, DIM: tl.constexpr):  # type: ignore[no-untyped-def]
    offsets = (row // GROUP).to(tl.int64)[:, None] * token + (row % GROUP).to(tl.int64)[:, None] * head
    inside = (row < end)[:, None] & (columns < DIM)[None, :]
    tl.store(base + offsets + columns[None, :], values.to(base.dtype.element_ty), inside)


@triton.jit
def _load_keys(base, position, end, token, columns, DIM: tl.constexpr):  # type: ignore[no-untyped-def]
    """Keys or values, (keys, dim); zero from `end` on."""
    offsets = position.to(tl.int64)[:, None] * token + columns[None, :]
    return tl.load(base + offsets, (position < end)[:, None] & (columns < DIM)[None, :], 0.0)


@triton.jit
def _reach(begin, tokens, sink, recent, GROUP: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Which blocks of keys are seen by the rows from `begin` on.

    Returns:
        nearest: the first key of the first window; blocks of the windows count from it.
        sinks: number of sink keys before that; blocks of the sink count from 0.
        inner_start, inner_end, blocks: of the windows' `blocks`, all rows see the inner ones, between the first two.
    """
    first, last = begin // GROUP, tl.minimum((begin + ROWS - 1) // GROUP, tokens - 1)
    nearest = tl.maximum(first - recent + 1, 0)
    inner_start = tl.cdiv(tl.maximum(last - recent + 1 - nearest, 0), BLOCK)
    inner_end = tl.maximum((first + 1 - nearest) // BLOCK, inner_start)
    blocks = tl.cdiv(last + 1 - nearest, BLOCK)
    return nearest, tl.minimum(sink, nearest), inner_start, inner_end, blocks


@triton.jit
def _inner_block(number, nearest, sinks, inner_start, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """The first key of an inner block, which needs no mask; blocks of the sink come first."""
    return tl.where(number < sinks // BLOCK, number * BLOCK, nearest + (number - sinks // BLOCK + inner_start) * BLOCK)


@triton.jit
def _edge_block(number, nearest, sinks, inner_start, inner_end, tokens, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """The first key of an edge block, which needs a mask, and where its keys end; the sink's remainder is first."""
    partial_sink = sinks % BLOCK != 0
    local = number - tl.where(partial_sink, 1, 0)
    in_sink = local < 0
    start = nearest + tl.where(local < inner_start, local, local - inner_start + inner_end) * BLOCK
    return tl.where(in_sink, sinks // BLOCK * BLOCK, start), tl.where(in_sink, sinks, tokens)


@triton.jit
def _sees(query, key, sink, recent):  # type: ignore[no-untyped-def]
    return (key <= query) & ((key < sink) | (query - key < recent))


@triton.jit
def streaming_forward(  # type: ignore[no-untyped-def]
    query, key, value, output, log_sum, scale, tokens, sink, recents,
    query_batch, query_head, query_token, key_batch, key_head, key_token, value_batch, value_head, value_token,
    output_batch, output_head, output_token,
    GROUP: tl.constexpr, DIM: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One program for each block of rows of each KV head."""
    begin, head, batch = tl.program_id(0) * ROWS, tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    recent = tl.load(recents + head)
    row, columns, end = begin + tl.arange(0, ROWS), tl.arange(0, COLUMNS), tokens * GROUP
    position = row // GROUP
    query += batch * query_batch + head * GROUP * query_head
    key += batch * key_batch + head * key_head
    value += batch * value_batch + head * value_head
    queries = _load_rows(query, row, end, query_head, query_token, columns, GROUP, DIM)
    row_max = tl.full([ROWS], FAR_BELOW, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    out = tl.zeros([ROWS, COLUMNS], tl.float32)
    nearest, sinks, inner_start, inner_end, blocks = _reach(begin, tokens, sink, recent, GROUP, ROWS, BLOCK)
    for number in range(0, sinks // BLOCK + inner_end - inner_start):
        token = _inner_block(number, nearest, sinks, inner_start, BLOCK) + tl.arange(0, BLOCK)
        keys = _load_keys(key, token, tokens, key_token, columns, DIM)
        values = _load_keys(value, token, tokens, value_token, columns, DIM)
        row_max, total, out = fold(queries, keys, values, True, row_max, total, out, scale, False, PRECISION)
    for number in range(0, tl.cdiv(sinks, BLOCK) - sinks // BLOCK + inner_start + blocks - inner_end):
        start, limit = _edge_block(number, nearest, sinks, inner_start, inner_end, tokens, BLOCK)
        token = start + tl.arange(0, BLOCK)
        keys = _load_keys(key, token, limit, key_token, columns, DIM)
        values = _load_keys(value, token, limit, value_token, columns, DIM)
        visible = _sees(position[:, None], token[None, :], sink, recent) & (token < limit)[None, :]
        row_max, total, out = fold(queries, keys, values, visible, row_max, total, out, scale, True, PRECISION)
    output += batch * output_batch + head * GROUP * output_head
    total = tl.where(row < end, total, 1.0)
    _store_rows(output, out / total[:, None], row, end, output_head, output_token, columns, GROUP, DIM)
    tl.store(log_sum + (batch * tl.num_programs(1) + head) * end + row, row_max + tl.log2(total), row < end)


@triton.jit
def _query_part(  # type: ignore[no-untyped-def]
    queries, keys, values, grads, visible, log_sums, delta, out, scale, MASKED: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    scores = tl.dot(queries, tl.trans(keys), input_precision=PRECISION) * scale
    weights = tl.exp2(scores - log_sums[:, None])
    if MASKED:
        weights = tl.where(visible, weights, 0.0)
    pulls = weights * (tl.dot(grads, tl.trans(values), input_precision=PRECISION) - delta[:, None])
    return tl.dot(pulls.to(keys.dtype), keys, out, input_precision=PRECISION)


@triton.jit
def streaming_query_gradient(  # type: ignore[no-untyped-def]
    query, key, value, output, grad, log_sum, deltas, query_grad, scale, tokens, sink, recents,
    query_batch, query_head, query_token, key_batch, key_head, key_token, value_batch, value_head, value_token,
    output_batch, output_head, output_token, grad_batch, grad_head, grad_token, to_batch, to_head, to_token,
    GROUP: tl.constexpr, DIM: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradient of a block of rows; `deltas` (each row's output times its gradient) is stored for the keys."""
    begin, head, batch = tl.program_id(0) * ROWS, tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    recent = tl.load(recents + head)
    row, columns, end = begin + tl.arange(0, ROWS), tl.arange(0, COLUMNS), tokens * GROUP
    position = row // GROUP
    query += batch * query_batch + head * GROUP * query_head
    key += batch * key_batch + head * key_head
    value += batch * value_batch + head * value_head
    output += batch * output_batch + head * GROUP * output_head
    grad += batch * grad_batch + head * GROUP * grad_head
    queries = _load_rows(query, row, end, query_head, query_token, columns, GROUP, DIM)
    grads = _load_rows(grad, row, end, grad_head, grad_token, columns, GROUP, DIM)
    outputs = _load_rows(output, row, end, output_head, output_token, columns, GROUP, DIM)
    flat = (batch * tl.num_programs(1) + head) * end + row
    log_sums = tl.load(log_sum + flat, row < end, float("inf"))
    delta = tl.sum(outputs.to(tl.float32) * grads.to(tl.float32), 1)
    tl.store(deltas + flat, delta, row < end)
    out = tl.zeros([ROWS, COLUMNS], tl.float32)
    nearest, sinks, inner_start, inner_end, blocks = _reach(begin, tokens, sink, recent, GROUP, ROWS, BLOCK)
    for number in range(0, sinks // BLOCK + inner_end - inner_start):
        token = _inner_block(number, nearest, sinks, inner_start, BLOCK) + tl.arange(0, BLOCK)
        keys = _load_keys(key, token, tokens, key_token, columns, DIM)
        values = _load_keys(value, token, tokens, value_token, columns, DIM)
        out = _query_part(queries, keys, values, grads, True, log_sums, delta, out, scale, False, PRECISION)
    for number in range(0, tl.cdiv(sinks, BLOCK) - sinks // BLOCK + inner_start + blocks - inner_end):
        start, limit = _edge_block(number, nearest, sinks, inner_start, inner_end, tokens, BLOCK)
        token = start + tl.arange(0, BLOCK)
        keys = _load_keys(key, token, limit, key_token, columns, DIM)
        values = _load_keys(value, token, limit, value_token, columns, DIM)
        visible = _sees(position[:, None], token[None, :], sink, recent) & (token < limit)[None, :]
        out = _query_part(queries, keys, values, grads, visible, log_sums, delta, out, scale, True, PRECISION)
    query_grad += batch * to_batch + head * GROUP * to_head
    _store_rows(query_grad, out * (scale * LN_2), row, end, to_head, to_token, columns, GROUP, DIM)


@triton.jit
def _key_part(  # type: ignore[no-untyped-def]
    queries, keys, values, grads, visible, log_sums, delta, key_out, value_out, scale,
    MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    scores = tl.dot(keys, tl.trans(queries), input_precision=PRECISION) * scale  # (keys, rows)
    weights = tl.exp2(scores - log_sums[None, :])
    if MASKED:
        weights = tl.where(visible, weights, 0.0)
    value_out = tl.dot(weights.to(grads.dtype), grads, value_out, input_precision=PRECISION)
    pulls = weights * (tl.dot(values, tl.trans(grads), input_precision=PRECISION) - delta[None, :])
    key_out = tl.dot(pulls.to(queries.dtype), queries, key_out, input_precision=PRECISION)
    return key_out, value_out


@triton.jit
def streaming_key_gradients(  # type: ignore[no-untyped-def]
    query, key, value, grad, log_sum, deltas, key_grad, value_grad, partial, scale, tokens, sink, recents, splits,
    chunk, query_batch, query_head, query_token, key_batch, key_head, key_token, value_batch, value_head, value_token,
    grad_batch, grad_head, grad_token, key_to_batch, key_to_head, key_to_token,
    value_to_batch, value_to_head, value_to_token,
    GROUP: tl.constexpr, DIM: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """`splits` programs for each block of the sink, each over `chunk` rows, then one for each block of other keys.

    The sink's partial sums go to `partial` (2, splits, batch, KV heads, sink, dim), keys first.
    """
    program, head, batch = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    recent = tl.load(recents + head)
    columns, heads = tl.arange(0, COLUMNS), tl.num_programs(1)
    sink_programs = tl.cdiv(sink, BLOCK) * splits
    in_sink = program < sink_programs
    split = program % splits
    start = tl.where(in_sink, program // splits * BLOCK, sink + (program - sink_programs) * BLOCK)
    key_end = tl.where(in_sink, sink, tokens)
    first = tl.where(in_sink, tl.maximum(split * chunk, start * GROUP), start * GROUP)
    last = tl.where(in_sink, (split + 1) * chunk, (start + BLOCK - 1 + recent) * GROUP)
    last = tl.minimum(last, tokens * GROUP)
    blocks = tl.cdiv(tl.maximum(last - first, 0), ROWS)
    inner_start = tl.minimum(tl.cdiv(tl.maximum((start + BLOCK - 1) * GROUP - first, 0), ROWS), blocks)
    inner_end = tl.where(in_sink, blocks, tl.maximum(tl.minimum(recent * GROUP // ROWS, blocks), inner_start))

    query += batch * query_batch + head * GROUP * query_head
    grad += batch * grad_batch + head * GROUP * grad_head
    token = start + tl.arange(0, BLOCK)
    keys = _load_keys(key + batch * key_batch + head * key_head, token, key_end, key_token, columns, DIM)
    values = _load_keys(value + batch * value_batch + head * value_head, token, key_end, value_token, columns, DIM)
    flat = (batch * heads + head) * tokens * GROUP
    key_out = tl.zeros([BLOCK, COLUMNS], tl.float32)
    value_out = tl.zeros([BLOCK, COLUMNS], tl.float32)
    for number in range(inner_start, inner_end):
        row = first + number * ROWS + tl.arange(0, ROWS)
        queries = _load_rows(query, row, last, query_head, query_token, columns, GROUP, DIM)
        grads = _load_rows(grad, row, last, grad_head, grad_token, columns, GROUP, DIM)
        log_sums = tl.load(log_sum + flat + row, row < last, float("inf"))
        delta = tl.load(deltas + flat + row, row < last, 0.0)
        key_out, value_out = _key_part(
            queries, keys, values, grads, True, log_sums, delta, key_out, value_out, scale, False, PRECISION
        )
    for number in range(0, inner_start + blocks - inner_end):
        block = tl.where(number < inner_start, number, number - inner_start + inner_end)
        row = first + block * ROWS + tl.arange(0, ROWS)
        queries = _load_rows(query, row, last, query_head, query_token, columns, GROUP, DIM)
        grads = _load_rows(grad, row, last, grad_head, grad_token, columns, GROUP, DIM)
        log_sums = tl.load(log_sum + flat + row, row < last, float("inf"))
        delta = tl.load(deltas + flat + row, row < last, 0.0)
        visible = _sees((row // GROUP)[None, :], token[:, None], sink, recent)
        key_out, value_out = _key_part(
            queries, keys, values, grads, visible, log_sums, delta, key_out, value_out, scale, True, PRECISION
        )
    key_out *= scale * LN_2
    inside = (token < key_end)[:, None] & (columns < DIM)[None, :]
    offsets = token.to(tl.int64)[:, None]
    if in_sink:
        parts = tl.num_programs(2).to(tl.int64) * heads * sink * DIM  # numbers in a part
        part = partial + split * parts + (batch * heads + head) * sink * DIM + offsets * DIM + columns[None, :]
        tl.store(part, key_out, inside)
        tl.store(part + splits * parts, value_out, inside)
    else:
        to = key_grad + batch * key_to_batch + head * key_to_head + offsets * key_to_token + columns[None, :]
        tl.store(to, key_out.to(key_grad.dtype.element_ty), inside)
        to = value_grad + batch * value_to_batch + head * value_to_head + offsets * value_to_token + columns[None, :]
        tl.store(to, value_out.to(value_grad.dtype.element_ty), inside)
