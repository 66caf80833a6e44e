"""Causal attention over the whole context, on the fastest backend that the machine has."""

import functools
import importlib.util
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from duo_id.errors import UserError

FULL_BACKENDS = ("auto", "sdpa", "cudnn", "flash_attn")


def full_attention(query: Tensor, key: Tensor, value: Tensor, scale: float | None, backend: str = "auto") -> Tensor:
    """Causal softmax attention.

    Args:
        query: (batch, heads, tokens, head_dim).
        key: (batch, KV heads, tokens, head_dim).
        value: (batch, KV heads, tokens, head_dim).
        scale: factor on the scores; None: 1/sqrt(head_dim).
        backend: `auto` takes cuDNN on Hopper and later (there 1.7x SDPA's flash backend at 32K tokens), flash-attn
            where it is installed, and otherwise what SDPA chooses; or one of these by name.

    Returns:
        (batch, heads, tokens, head_dim).

    Raises:
        UserError: flash-attn was asked for and is not installed, or the backend is unknown.
    """
    chosen = _choose(backend, query.device.type, query.dtype)
    if chosen == "flash_attn":
        return _flash_attn(query, key, value, scale)
    with _prefer_cudnn() if chosen == "cudnn" else nullcontext():
        return F.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=scale, enable_gqa=query.shape[1] != key.shape[1]
        )


@functools.cache
def _choose(backend: str, device: str, dtype: torch.dtype) -> str:
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
    if torch.cuda.get_device_capability()[0] >= 9 and torch.backends.cudnn.is_available():
        return "cudnn"
    return "flash_attn" if importlib.util.find_spec("flash_attn") else "sdpa"


def _prefer_cudnn() -> AbstractContextManager[None]:
    order = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    return sdpa_kernel(order, set_priority=True)


def _flash_attn(query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
    from flash_attn import flash_attn_func

    tokens_first = (x.transpose(1, 2) for x in (query, key, value))
    return flash_attn_func(*tokens_first, softmax_scale=scale, causal=True).transpose(1, 2)
