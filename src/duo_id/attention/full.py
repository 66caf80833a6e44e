"""Causal attention over the whole context, on the machine's fastest backend."""

import functools
import importlib.util
from collections.abc import Iterable
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from duo_id.attention.choices import FULL_BACKENDS
from duo_id.attention.memo import memo
from duo_id.attention.softmax import ROWS, Softmax, attend_at, attend_by_rows, join
from duo_id.common.errors import UserError

CUDNN_MAX_DIM = 128  # the widest head that cuDNN's forward pass takes in every supported version
CUDNN_MIN_TOKENS = 8192  # below, planning a new shape costs cuDNN more than its speed gains
FALLBACKS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
ORDERS = {"cudnn": [SDPBackend.CUDNN_ATTENTION, *FALLBACKS], "flash": FALLBACKS}


def full_attention(
    query: Tensor, key: Tensor, value: Tensor, softmax: Softmax, backend: str = "auto", rows: Tensor | None = None
) -> Tensor:
    """Causal softmax attention; the queries are those of the last tokens, or of `rows`.

    With a past (keys before the queries), attention over the past and over the queries' own tokens are computed
    separately and merged by their log-sum-exp, so that both stay on the fast backend and no mask is built. The merged
    result has no gradient.

    Args:
        query: (batch, heads, queries, head_dim).
        key: (batch, KV heads, tokens, head_dim), tokens >= queries.
        value: (batch, KV heads, tokens, head_dim).
        softmax: the layer's scale, soft cap and sinks; the last two are computed by `attend_by_rows`.
        backend: `auto` takes cuDNN for long contexts on Hopper and later (1.7x SDPA's flash backend at 32K tokens),
            else flash-attn where it is installed, and otherwise SDPA's flash backend, which does no planning, so that
            batches of ever new shapes cost no more; or one of these by name; `sdpa` leaves the choice to SDPA.
        rows: (queries,) positions of the queries, for a few queries anywhere in the context.

    Returns:
        (batch, heads, queries, head_dim).

    Raises:
        UserError: flash-attn was requested but is not installed, or the backend is unknown.
    """
    implementation = _choose(backend, query.device.type, query.dtype, key.shape[2] >= CUDNN_MIN_TOKENS)
    if rows is not None:
        return attend_at(query, key, value, softmax, rows)
    if not softmax.plain:
        return attend_by_rows(query, key, value, softmax)
    scale = softmax.scale
    if implementation == "flash_attn":
        return _flash_attn(query, key, value, scale)
    past = key.shape[2] - query.shape[2]
    if past and query.shape[2] > 1:
        return _attend_with_past(query, key, value, past, scale, implementation)
    with memo(), sdpa_kernel(ORDERS[implementation], set_priority=True) if implementation in ORDERS else nullcontext():
        return F.scaled_dot_product_attention(
            query, key, value, is_causal=not past, scale=scale, enable_gqa=query.shape[1] != key.shape[1]
        )


def attention_in_parts(
    query: Tensor, parts: Iterable[tuple[Tensor, Tensor]], softmax: Softmax, backend: str = "auto"
) -> Tensor:
    """Causal softmax attention over a context that comes in parts, of which one at a time is in memory; no gradient.

    Args:
        query: (batch, heads, queries, head_dim), of the last tokens.
        parts: keys and values (batch, KV heads, any, head_dim): first those of the queries' own tokens, then those of
            earlier ones, at least one each, in any order.
        softmax: of the layer.
        backend: see `full_attention`.

    Returns:
        (batch, heads, queries, head_dim).
    """
    found = (_part(query, *part, not place, softmax, backend) for place, part in enumerate(parts))
    return join(found, softmax).to(query.dtype)


def _part(
    query: Tensor, key: Tensor, value: Tensor, causal: bool, softmax: Softmax, backend: str
) -> tuple[Tensor, Tensor]:
    """Attention over a part of the context without sinks, and the log-sum-exp of its scores."""
    if softmax.plain:
        implementation = _choose(backend, query.device.type, query.dtype, key.shape[2] >= CUDNN_MIN_TOKENS)
        return _with_log_sum(query, key, value, causal, softmax.scale, implementation)
    place, found = torch.arange(key.shape[2], device=query.device), []
    for start in range(0, query.shape[2], ROWS):
        rows = query[:, :, start : start + ROWS]
        row = start + torch.arange(rows.shape[2], device=query.device)
        found.append(softmax.attend_part(rows, key, value, (place <= row[:, None]) | (not causal)))
    return torch.cat([out for out, _ in found], 2), torch.cat([log_sum for _, log_sum in found], 2)


def dense_attention(query: Tensor, key: Tensor, value: Tensor, softmax: Softmax, mask: Tensor) -> Tensor:
    """Attention under the model's own mask, bool or added to the scores, broadcast over the heads."""
    if not softmax.plain:
        return softmax.attend(query, key, value, mask)
    gqa = query.shape[1] != key.shape[1]
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=softmax.scale, enable_gqa=gqa)


@functools.cache
def _choose(backend: str, device: str, dtype: torch.dtype, long_context: bool) -> str:
    if backend not in FULL_BACKENDS:
        raise UserError(f"step.full_backend={backend}: choose one of {', '.join(FULL_BACKENDS)}")
    if backend == "flash_attn" and importlib.util.find_spec("flash_attn") is None:
        raise UserError(
            "step.full_backend=flash_attn: flash-attn is not installed (pip install duo_id[flash]), or use auto"
        )
    if backend != "auto":
        return backend
    if device != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return "sdpa"
    if long_context and torch.cuda.get_device_capability()[0] >= 9 and torch.backends.cudnn.is_available():
        return "cudnn"
    return "flash_attn" if importlib.util.find_spec("flash_attn") else "flash"


def _attend_with_past(
    query: Tensor, key: Tensor, value: Tensor, past: int, scale: float | None, backend: str
) -> Tensor:
    """Attention over the past and causal attention over the new tokens, weighted by their shares of the softmax."""
    past_output, past_sum = _with_log_sum(query, key[:, :, :past], value[:, :, :past], False, scale, backend)
    recent, recent_sum = _with_log_sum(query, key[:, :, past:], value[:, :, past:], True, scale, backend)
    return recent.lerp_(past_output, torch.sigmoid(past_sum - recent_sum).unsqueeze(-1).to(recent.dtype))


def _with_log_sum(
    query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: float | None, backend: str
) -> tuple[Tensor, Tensor]:
    """Attention (batch, heads, queries, head_dim) and the float32 log-sum-exp of its scores (batch, heads, queries).

    F.scaled_dot_product_attention does not return the second, so its backends are called directly.
    """
    ops, queries, dim = torch.ops.aten, query.shape[2], query.shape[3]
    scale = dim**-0.5 if scale is None else scale
    if not query.is_cuda:
        out, log_sum = ops._scaled_dot_product_flash_attention_for_cpu(query, key, value, 0.0, causal, scale=scale)
        return out, log_sum
    if query.dtype == torch.float32:
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
        out, log_sum, *_ = ops._scaled_dot_product_efficient_attention(
            query, key, value, None, True, 0.0, causal, scale=scale
        )
    elif backend == "cudnn" and dim % 8 == 0 and dim <= CUDNN_MAX_DIM:
        out, log_sum, *_ = ops._scaled_dot_product_cudnn_attention(
            query, key, value, None, True, 0.0, causal, False, scale=scale
        )
    else:
        padded = (F.pad(x, (0, -dim % 8)) for x in (query, key, value))
        out, log_sum, *_ = ops._scaled_dot_product_flash_attention(*padded, 0.0, causal, False, scale=scale)
        out = out[..., :dim]
    # Some backends pad the rows, some append a dimension of 1.
    return out, log_sum.reshape(*query.shape[:2], -1)[..., :queries]


def _flash_attn(query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
    from flash_attn import flash_attn_func

    tokens_first = (x.transpose(1, 2) for x in (query, key, value))
    return flash_attn_func(*tokens_first, softmax_scale=scale, causal=True).transpose(1, 2)
