"""Streaming attention of whole sequences as an operator with a gradient, which torch.compile treats as opaque."""

import torch
import triton
from torch import Tensor

from duo_id.attention.kernels.shared import LOG2_E, padded_dim, precision
from duo_id.attention.kernels.streaming import streaming_forward, streaming_key_gradients, streaming_query_gradient

# The best of 36 launch settings for each kernel on an H100 (docs/performance.md). A tile (rows or keys, times the
# width of a head) has at most `TILE_BYTES`.
FORWARD_TUNING = {"rows": 64, "block": 32, "warps": 4, "stages": 3}
QUERY_TUNING = {"rows": 64, "block": 32, "warps": 4, "stages": 2}
KEY_TUNING = {"rows": 64, "block": 64, "warps": 4, "stages": 2}
TILE_BYTES = 128 * 128 * 2
CHUNK = 4096  # rows that one program sums for the sink's gradients, which come from all queries


@torch.library.custom_op("duo_id::stream", mutates_args=())
def stream(
    query: Tensor, key: Tensor, value: Tensor, recent_sizes: Tensor, sink_size: int, scale: float
) -> tuple[Tensor, Tensor]:
    """Streaming attention of all heads over whole sequences.

    Args:
        query: (batch, heads, tokens, head_dim); like all tensors here, its last dimension is contiguous.
        key: (batch, KV heads, tokens, head_dim).
        value: the same shape.
        recent_sizes: (KV heads,) int32, the most recent tokens that a query of each head sees, including its own.
        sink_size: first tokens that every query sees.
        scale: factor on the scores.

    Returns:
        the output, (batch, heads, tokens, head_dim), and the log-sum of the softmax in base 2, float32,
        (batch, KV heads, tokens * group), which has no gradient.
    """
    batch, kv_heads, tokens, _ = key.shape
    group = query.shape[1] // kv_heads
    out = torch.empty_like(query)
    log_sum = torch.empty(batch, kv_heads, tokens * group, dtype=torch.float32, device=query.device)
    sizes = _sizes(FORWARD_TUNING, query, key)
    streaming_forward[(triton.cdiv(tokens * group, sizes["ROWS"]), kv_heads, batch)](
        query, key, value, out, log_sum, scale * LOG2_E, tokens, min(sink_size, tokens), recent_sizes,
        *_strides(query, key, value, out), **sizes,
    )  # fmt: skip
    return out, log_sum


@torch.library.custom_op("duo_id::stream_backward", mutates_args=())
def stream_backward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    recent_sizes: Tensor,
    out: Tensor,
    log_sum: Tensor,
    grad: Tensor,
    sink_size: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of query, key and value, given that of the output; see `stream` for the other arguments."""
    batch, kv_heads, tokens, dim = key.shape
    group, sink, scale = query.shape[1] // kv_heads, min(sink_size, tokens), scale * LOG2_E
    query_grad, key_grad, value_grad = (torch.empty_like(x) for x in (query, key, value))
    deltas = torch.empty_like(log_sum)
    sizes = _sizes(QUERY_TUNING, query, key)
    streaming_query_gradient[(triton.cdiv(tokens * group, sizes["ROWS"]), kv_heads, batch)](
        query, key, value, out, grad, log_sum, deltas, query_grad, scale, tokens, sink, recent_sizes,
        *_strides(query, key, value, out, grad, query_grad), **sizes,
    )  # fmt: skip
    sizes = _sizes(KEY_TUNING, query, key)
    splits = triton.cdiv(tokens * group, CHUNK)
    partial = torch.empty(2, splits, batch, kv_heads, sink, dim, dtype=torch.float32, device=query.device)
    programs = triton.cdiv(sink, sizes["BLOCK"]) * splits + triton.cdiv(tokens - sink, sizes["BLOCK"])
    streaming_key_gradients[(programs, kv_heads, batch)](
        query, key, value, grad, log_sum, deltas, key_grad, value_grad, partial, scale, tokens, sink, recent_sizes,
        splits, CHUNK, *_strides(query, key, value, grad, key_grad, value_grad), **sizes,
    )  # fmt: skip
    if sink:
        key_grad[:, :, :sink], value_grad[:, :, :sink] = partial.sum(1)
    return query_grad, key_grad, value_grad


@stream.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *rest: object) -> tuple[Tensor, Tensor]:
    batch, kv_heads, tokens, _ = key.shape
    log_sum = query.new_empty(batch, kv_heads, tokens * (query.shape[1] // kv_heads), dtype=torch.float32)
    return torch.empty_like(query), log_sum


@stream_backward.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *rest: object) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def _setup(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    *tensors, ctx.sink_size, ctx.scale = inputs
    ctx.save_for_backward(*tensors, *output)


def _backward(ctx, grad, unused):  # type: ignore[no-untyped-def]
    grad = grad if grad.stride(-1) == 1 else grad.contiguous()
    grads = stream_backward(*ctx.saved_tensors, grad, ctx.sink_size, ctx.scale)
    return *grads, None, None, None


stream.register_autograd(_backward, setup_context=_setup)


def _sizes(tuning: dict[str, int], query: Tensor, key: Tensor) -> dict[str, object]:
    """Launch settings: wide heads and wide types get smaller blocks, so that they fit into shared memory."""
    dim = query.shape[-1]
    fit = max(16, TILE_BYTES // (padded_dim(dim) * query.element_size()))
    shrink = max(1, 128 // fit)
    return {
        "GROUP": query.shape[1] // key.shape[1],
        "DIM": dim,
        "COLUMNS": padded_dim(dim),
        "ROWS": max(16, tuning["rows"] // shrink),
        "BLOCK": max(16, tuning["block"] // shrink),
        "PRECISION": precision(query),
        "num_warps": tuning["warps"],
        "num_stages": tuning["stages"],
    }


def _strides(*tensors: Tensor) -> list[int]:
    return [stride for tensor in tensors for stride in tensor.stride()[:3]]
