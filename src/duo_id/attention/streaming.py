"""Streaming attention (sink and recent window only), in memory linear in the number of tokens."""

import functools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from duo_id.attention.choices import STREAMING_BACKENDS
from duo_id.attention.full import full_attention
from duo_id.attention.softmax import Softmax, attend_at, attend_by_rows
from duo_id.attention.window import Window
from duo_id.common.errors import UserError

FLEX_BLOCK = 128  # FlexAttention's block of queries and of keys


def streaming_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    softmax: Softmax,
    window: Window,
    backend: str = "auto",
    rows: Tensor | None = None,
) -> Tensor:
    """Causal attention of streaming heads: each query sees the sink and the recent window (`Window.sees`).

    The queries are those of the last tokens. Keys of tokens that no query sees may be omitted.

    Args:
        query: (batch, heads, queries, head_dim).
        key: (batch, KV heads, tokens, head_dim), tokens >= queries.
        value: (batch, KV heads, tokens, head_dim).
        softmax: the layer's scale, soft cap and sinks; the last two are computed by `attend_by_rows`.
        window: sink and recent sizes, in tokens.
        backend: `triton` (our kernels, CUDA), `flex` (compiled FlexAttention, CUDA), `blocked` (SDPA over blocks of
            queries, any device), or `auto`: triton on CUDA, except for float64; otherwise blocked. Queries with a past
            are always blocked.
        rows: (queries,) positions of the queries, for a few queries anywhere in the context.

    Returns:
        (batch, heads, queries, head_dim).

    Raises:
        UserError: the backend is unknown or does not work on this device.
    """
    if backend not in STREAMING_BACKENDS:
        raise UserError(f"step.streaming_backend={backend}: choose one of {', '.join(STREAMING_BACKENDS)}")
    if rows is not None:
        return attend_at(query, key, value, softmax, rows, window)
    tokens, past = key.shape[2], key.shape[2] - query.shape[2]
    if tokens <= window.sink_size + window.recent_size:
        return full_attention(query, key, value, softmax)  # no gap between sink and window
    if not softmax.plain:
        return attend_by_rows(query, key, value, softmax, window)
    scale, backend = softmax.scale, _chosen(backend, query)
    if past or backend == "blocked":
        return _blocked(query, key, value, scale, window)
    if backend == "triton":
        return _triton(query, key, value, scale, window.sink_size, (window.recent_size,) * key.shape[1])
    gradient = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad)
    if gradient and not query.is_cuda:
        raise UserError(f"step.streaming_backend={backend} has no backward pass on this device: use blocked or auto")
    return _flex(query, key, value, scale, window)


def spans_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    softmax: Softmax,
    spans: Sequence[int],
    sink_size: int,
    backend: str = "auto",
    rows: Tensor | None = None,
) -> Tensor:
    """Streaming attention of whole sequences where each head sees the sink and its own span of latest tokens.

    Our kernels take all heads in one launch, forward and backward; other backends take one span at a time.

    Args:
        query: (batch, heads, tokens, head_dim).
        key: (batch, KV heads, tokens, head_dim).
        value: the same shape.
        softmax: of the layer.
        spans: of each KV head, in tokens.
        sink_size: first tokens that every head sees.
        backend: see `streaming_attention`.
        rows: (queries,) positions of the queries, for a few queries anywhere in the context.

    Returns:
        the shape of `query`.
    """
    if rows is None and len({*spans}) > 1 and softmax.plain and _chosen(backend, query) == "triton":
        return _triton(query, key, value, softmax.scale, sink_size, tuple(spans))
    kv_heads, groups = key.shape[1], dict[int, list[int]]()
    for head, span in enumerate(spans):
        groups.setdefault(span, []).append(head)
    if len(groups) == 1:
        return streaming_attention(query, key, value, softmax, Window(sink_size, spans[0]), backend, rows)
    grouped = query.unflatten(1, (kv_heads, -1))
    out = torch.empty_like(grouped)
    for span, heads in groups.items():
        inputs = (grouped[:, heads].flatten(1, 2), key[:, heads], value[:, heads], softmax.of(heads, kv_heads))
        part = streaming_attention(*inputs, Window(sink_size, span), backend, rows)
        out[:, heads] = part.unflatten(1, (len(heads), -1))
    return out.flatten(1, 2)


def _chosen(backend: str, query: Tensor) -> str:
    """The backend that `auto` stands for."""
    if backend != "auto":
        return backend
    return "triton" if query.is_cuda and query.dtype != torch.float64 else "blocked"


def _blocked(query: Tensor, key: Tensor, value: Tensor, scale: float | None, window: Window) -> Tensor:
    """Blocks of queries against the sink and the few blocks of keys that reach into their window.

    The first tokens, up to sink + recent, see everything before them. Those from there to the first block whose window
    no longer overlaps the sink get a separate mask; all later blocks have the same mask. A query group shares its KV
    head by being folded into the query dimension, so keys are not repeated.
    """
    batch, heads, queries, dim = query.shape
    kv_heads, tokens = key.shape[1:3]
    group, past, sink = heads // kv_heads, tokens - queries, window.sink_size
    power = 1 << (window.recent_size - 1).bit_length()
    block = max(64, min(power, 256), power // 4)
    reach = -(-window.recent_size // block)  # how many earlier blocks a window can reach into
    start = min(tokens, max(past, (-(-sink // block) + reach) * block))  # no window overlaps the sink from here on
    first = min(start, max(past, sink + window.recent_size))
    parts = []
    if past < first:
        parts.append(
            full_attention(query[:, :, : first - past], key[:, :, :first], value[:, :, :first], Softmax(scale))
        )
    if first < start:
        middle = F.scaled_dot_product_attention(
            query[:, :, first - past : start - past].reshape(batch, kv_heads, group * (start - first), dim),
            key[:, :, :start],
            value[:, :, :start],
            attn_mask=_middle_mask(window, first, start, group, query.device),
            scale=scale,
        )
        parts.append(middle.reshape(batch, heads, start - first, dim))
    if start == tokens:
        return torch.cat(parts, dim=2)

    blocks = -(-(tokens - start) // block)
    tail = start + blocks * block - tokens

    def windows(x: Tensor) -> Tensor:
        """(batch, KV heads, tokens, dim) to (batch, KV heads * blocks, sink + (reach + 1) * block, dim)."""
        local = F.pad(x[:, :, start - reach * block :], (0, 0, 0, tail)).unflatten(2, (blocks + reach, block))
        sinks = x[:, :, None, :sink].expand(-1, -1, blocks, -1, -1)
        return torch.cat([sinks, *(local[:, :, i : i + blocks] for i in range(reach + 1))], dim=3).flatten(1, 2)

    rows = F.pad(query[:, :, start - past :], (0, 0, 0, tail)).view(batch, kv_heads, group, blocks, block, dim)
    body = F.scaled_dot_product_attention(
        rows.transpose(2, 3).reshape(batch, kv_heads * blocks, group * block, dim),
        windows(key),
        windows(value),
        attn_mask=_block_mask(window, block, reach, group, query.device),
        scale=scale,
    ).reshape(batch, kv_heads, blocks, group, block, dim)
    body = body.transpose(2, 3).reshape(batch, heads, blocks * block, dim)
    return torch.cat([*parts, body[:, :, : tokens - start]], dim=2)


@functools.lru_cache(maxsize=64)
def _middle_mask(window: Window, first: int, start: int, group: int, device: torch.device) -> Tensor:
    """The pattern of queries `first` to `start`, (group * (start - first), start); all layers share one."""
    with torch.inference_mode(False):
        positions = torch.arange(start, device=device)
        return window.dense(positions[first:], positions).repeat(group, 1)


@functools.lru_cache(maxsize=64)
def _block_mask(window: Window, block: int, reach: int, group: int, device: torch.device) -> Tensor:
    """The pattern of all later blocks against sink and local keys, (group * block, sink + (reach + 1) * block)."""
    with torch.inference_mode(False):
        rows = torch.arange(block, device=device) + window.sink_size + reach * block
        columns = torch.arange((reach + 1) * block, device=device) + window.sink_size
        return F.pad(window.dense(rows, columns), (window.sink_size, 0), value=True).repeat(group, 1)


def _triton(
    query: Tensor, key: Tensor, value: Tensor, scale: float | None, sink_size: int, spans: tuple[int, ...]
) -> Tensor:
    try:
        from duo_id.attention.kernels.operator import stream
    except ModuleNotFoundError as error:
        raise UserError("step.streaming_backend=triton: Triton is not installed: use blocked or auto") from error

    query, key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value))
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    return stream(query, key, value, _on_device(spans, query.device), sink_size, scale)[0]


@functools.lru_cache(maxsize=1024)
def _on_device(spans: tuple[int, ...], device: torch.device) -> Tensor:
    """The spans as an int32 tensor, copied once: nothing may wait in a captured step."""
    with torch.inference_mode(False):
        return torch.tensor(spans, dtype=torch.int32, device=device)


def _flex(query: Tensor, key: Tensor, value: Tensor, scale: float | None, window: Window) -> Tensor:
    """FlexAttention, padded to the next power of 2 because it is recompiled for each length."""
    tokens = query.shape[2]
    size = max(FLEX_BLOCK, 1 << (tokens - 1).bit_length())
    query, key, value = (F.pad(x, (0, 0, 0, size - tokens)) for x in (query, key, value))
    attend = _compiled_flex() if query.is_cuda else flex_attention
    out = attend(
        query,
        key,
        value,
        block_mask=flex_block_mask(window, size, query.device),
        scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return out[:, :, :tokens]


@functools.cache
def _compiled_flex() -> Any:
    # One graph for each length, with and without gradients; past this limit dynamo falls back to a dense product.
    torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
    return torch.compile(flex_attention, dynamic=False)


@functools.lru_cache(maxsize=64)
def flex_block_mask(window: Window, tokens: int, device: torch.device) -> BlockMask:
    """The pattern for FlexAttention, computed block by block: nothing of size tokens x tokens is built."""
    first = torch.arange(0, tokens, FLEX_BLOCK, device=device)
    last = first + FLEX_BLOCK - 1
    query_first, query_last, key_first, key_last = first[:, None], last[:, None], first[None, :], last[None, :]
    some = (key_first <= query_last) & ((key_first < window.sink_size) | (query_first - key_last < window.recent_size))
    every = (key_last <= query_first) & ((key_last < window.sink_size) | (query_last - key_first < window.recent_size))

    def block_lists(included: Tensor) -> tuple[Tensor, Tensor]:
        order = torch.argsort(included.to(torch.int32), dim=-1, descending=True, stable=True)
        return included.sum(-1, dtype=torch.int32)[None, None], order.to(torch.int32)[None, None]

    return BlockMask.from_kv_blocks(
        *block_lists(some & ~every),
        *block_lists(every),
        BLOCK_SIZE=FLEX_BLOCK,
        mask_mod=lambda batch, head, query, key: window.sees(query, key),
        seq_lengths=(tokens, tokens),
    )
