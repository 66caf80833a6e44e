"""The Triton kernel of streaming heads in prefill, whatever their spans: one launch for a chunk with its past.

It reads the rings of `duo_id.deploy` in place.
"""

import triton
import triton.language as tl
from torch import Tensor

from duo_id.attention.kernels.shared import FAR_BELOW, LOG2_E, fit, fold, padded_dim, precision

STREAM_TUNING = {"rows": 128, "block": 32, "warps": 4, "stages": 3}  # on an H200; see docs/performance.md


@triton.jit
def streaming_prefill(  # type: ignore[no-untyped-def]
    query, key, value, recent_key, recent_value, streaming, output, scale, past, tokens, stored, sink, streaming_heads,
    query_batch, query_head, query_token, key_batch, key_head, key_token, value_batch, value_head, value_token,
    output_batch, output_head, output_token,
    GROUP: tl.constexpr, DIM: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One program for each block of queries of a query head, over the stored slots it sees, then the chunk's keys.

    Heads with the longest span come first, so that short programs fill the gaps at the end.
    """
    begin = tl.program_id(0) * ROWS
    store, member, batch = tl.program_id(1) // GROUP, tl.program_id(1) % GROUP, tl.program_id(2).to(tl.int64)
    head = tl.load(streaming + store).to(tl.int64)
    first = tl.load(streaming + streaming_heads + store)
    recent = tl.load(streaming + 2 * streaming_heads + store)
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

    base = (batch * stored + first) * DIM
    oldest = tl.minimum(tl.maximum(past + begin - recent + 1, sink), past)  # the first that a window reaches into
    held = tl.minimum(sink, past)
    sinks = tl.cdiv(held, BLOCK)
    for number in range(0, sinks + tl.cdiv(past - oldest, BLOCK)):
        token = tl.where(number < sinks, number * BLOCK, oldest + (number - sinks) * BLOCK) + tl.arange(0, BLOCK)
        slot = tl.where(token < sink, token, sink + (token - sink) % recent)
        here = token < tl.where(number < sinks, held, past)
        offsets = base + slot.to(tl.int64)[:, None] * DIM + columns[None, :]
        block_keys = tl.load(recent_key + offsets, here[:, None] & in_head, 0.0)
        block_values = tl.load(recent_value + offsets, here[:, None] & in_head, 0.0)
        visible = here[None, :] & ((token[None, :] < sink) | (position[:, None] - token[None, :] < recent))
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


def stream(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    recent_key: Tensor,
    recent_value: Tensor,
    streaming: Tensor,
    past: int,
    sink_size: int,
    scale: float,
    out: Tensor,
    **tuning: int,
) -> None:
    """Attention of the streaming heads for a chunk of tokens, written to their rows of `out`.

    Args:
        query: (batch, query heads, tokens, head_dim); like all tensors here, its last dimension is contiguous.
        key: (batch, KV heads, tokens, head_dim), the chunk's own keys, of all heads.
        value: (batch, KV heads, tokens, head_dim).
        recent_key: (batch, rows, head_dim), what the streaming heads keep of the past; see `decode_attention`.
        recent_value: the same shape.
        streaming: (3, streaming heads) int32, the KV head, first row and span of each head of `recent_key`.
        past: tokens before the chunk, the same in each sample.
        sink_size: first tokens that streaming heads see.
        scale: factor on the scores.
        out: (batch, query heads, tokens, head_dim), written only at the streaming heads.
        tuning: launch settings that override the default.
    """
    batch, query_heads, tokens, dim = query.shape
    group, heads = query_heads // key.shape[1], streaming.shape[1]
    launch = STREAM_TUNING | tuning
    rows = fit(launch["rows"], query)
    streaming_prefill[(triton.cdiv(tokens, rows), heads * group, batch)](
        query, key, value, recent_key, recent_value, streaming, out, scale * LOG2_E, past, tokens,
        recent_key.shape[1], sink_size, heads, *query.stride()[:3], *key.stride()[:3], *value.stride()[:3],
        *out.stride()[:3],
        GROUP=group, DIM=dim, COLUMNS=padded_dim(dim), ROWS=rows, BLOCK=min(rows, launch["block"]),
        num_warps=launch["warps"], num_stages=launch["stages"], PRECISION=precision(query),
    )  # fmt: skip
