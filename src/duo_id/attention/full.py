"""Causal attention over the whole context, on the fastest backend that the machine has."""

import functools
import importlib.util
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from duo_id.attention.memo import memo
from duo_id.attention.softmax import Softmax, attend_at, attend_by_rows
from duo_id.common.errors import UserError

FULL_BACKENDS = ("auto", "sdpa", "cudnn", "flash", "flash_attn")
CUDNN_MAX_DIM = 128  # widest head of cuDNN's forward pass that every supported version has
CUDNN_MIN_TOKENS = 8192  # below, planning a new shape costs cuDNN more than its speed gains
OTHERS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
ORDERS = {"cudnn": [SDPBackend.CUDNN_ATTENTION, *OTHERS], "flash": OTHERS}


def full_attention(
    query: Tensor, key: Tensor, value: Tensor, softmax: Softmax, backend: str = "auto", rows: Tensor | None = None
) -> Tensor:
    """Causal softmax attention; the queries are those of the last tokens, or of `rows`.

    With a past, keys before the queries, its part and the queries' own part are computed apart and joined by their
    log-sum-exp, so that both stay on the fast backend and no mask is built. This has no gradient.

    Args:
        query: (batch, heads, queries, head_dim).
        key: (batch, KV heads, tokens, head_dim), tokens >= queries.
        value: (batch, KV heads, tokens, head_dim).
        softmax: of the layer: scale, soft cap and sinks; the last two have a path of their own, `attend_by_rows`.
        backend: `auto` takes cuDNN for long contexts on Hopper and later (there 1.7x SDPA's flash backend at 32K
            tokens), else flash-attn where it is installed, and otherwise SDPA's flash backend, which plans nothing, so
            that batches of ever new shapes cost no more; or one of these by name, `sdpa`: what SDPA chooses.
        rows: (queries,) positions of the queries, for a few of them anywhere.

    Returns:
        (batch, heads, queries, head_dim).

    Raises:
        UserError: flash-attn was asked for and is not installed, or the backend is unknown.
    """
    chosen = _choose(backend, query.device.type, query.dtype, key.shape[2] >= CUDNN_MIN_TOKENS)
    if rows is not None:
        return attend_at(query, key, value, softmax, rows)
    if not softmax.plain:
        return attend_by_rows(query, key, value, softmax)
    scale = softmax.scale
    if chosen == "flash_attn":
        return _flash_attn(query, key, value, scale)
    past = key.shape[2] - query.shape[2]
    if past and query.shape[2] > 1:
        return _joined(query, key, value, past, scale, chosen)
    with memo(), sdpa_kernel(ORDERS[chosen], set_priority=True) if chosen in ORDERS else nullcontext():
        return F.scaled_dot_product_attention(
            query, key, value, is_causal=not past, scale=scale, enable_gqa=query.shape[1] != key.shape[1]
        )


def dense_attention(query: Tensor, key: Tensor, value: Tensor, softmax: Softmax, mask: Tensor) -> Tensor:
    """Attention under a matrix of the model's own, bool or added to the scores, broadcast over the heads."""
    if not softmax.plain:
        return softmax.attend(query, key, value, mask)
    gqa = query.shape[1] != key.shape[1]
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=softmax.scale, enable_gqa=gqa)


@functools.cache
def _choose(backend: str, device: str, dtype: torch.dtype, long: bool) -> str:
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
    if long and torch.cuda.get_device_capability()[0] >= 9 and torch.backends.cudnn.is_available():
        return "cudnn"
    return "flash_attn" if importlib.util.find_spec("flash_attn") else "flash"


def _joined(query: Tensor, key: Tensor, value: Tensor, past: int, scale: float | None, chosen: str) -> Tensor:
    """The part over the past and the causal part, weighted by their shares of the softmax's sum."""
    before, before_sum = _with_log_sum(query, key[:, :, :past], value[:, :, :past], False, scale, chosen)
    own, own_sum = _with_log_sum(query, key[:, :, past:], value[:, :, past:], True, scale, chosen)
    return own.lerp_(before, torch.sigmoid(before_sum - own_sum).unsqueeze(-1).to(own.dtype))


def _with_log_sum(
    query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: float | None, chosen: str
) -> tuple[Tensor, Tensor]:
    """Attention (batch, heads, queries, head_dim) and the float32 log-sum-exp of its scores (batch, heads, queries).

    F.scaled_dot_product_attention does not return the second, so its backends are called by their own names.
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
    elif chosen == "cudnn" and dim % 8 == 0 and dim <= CUDNN_MAX_DIM:
        out, log_sum, *_ = ops._scaled_dot_product_cudnn_attention(
            query, key, value, None, True, 0.0, causal, False, scale=scale
        )
    else:
        padded = (F.pad(x, (0, -dim % 8)) for x in (query, key, value))
        out, log_sum, *_ = ops._scaled_dot_product_flash_attention(*padded, 0.0, causal, False, scale=scale)
        out = out[..., :dim]
    return out, log_sum.reshape(*query.shape[:2], -1)[..., :queries]  # some pad the rows, some end in a dimension of 1


def _flash_attn(query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
    from flash_attn import flash_attn_func

    tokens_first = (x.transpose(1, 2) for x in (query, key, value))
    return flash_attn_func(*tokens_first, softmax_scale=scale, causal=True).transpose(1, 2)
