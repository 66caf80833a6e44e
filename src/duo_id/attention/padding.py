"""Padding, the only part of transformers' attention masks that is needed here: layers know their own pattern."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.masking_utils import causal_mask_function, sdpa_mask

from duo_id.common.errors import UserError


def no_padding(ids: Tensor) -> Tensor:
    """An attention mask for `ids` (batch, tokens) that says, without synchronising the device, that all are real.

    It is one element expanded, which `padding_mask` recognises by its strides. Without any mask, transformers looks
    for packed sequences, which waits for the device.
    """
    return torch.ones((), dtype=torch.bool, device=ids.device).expand(ids.shape)


def first_position(model: nn.Module) -> int:
    """The position of a text's first token: 0, unless the model's position embeddings have a padding entry."""
    tables = (part for name, part in model.named_modules() if name.endswith("position_embeddings"))
    return next((x.padding_idx + 1 for x in tables if getattr(x, "padding_idx", None) is not None), 0)


def padding_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    **options: Any,
) -> Tensor | None:
    """The function that transformers calls to make the mask: only padding is passed on, layers know the rest.

    Returns:
        (batch, tokens) bool, True for real tokens, if a sample has padding that causality does not hide, else None. A
        layer whose own pattern is neither causal nor a sliding window gets that pattern as a dense mask.
    """
    if mask_function is not causal_mask_function and not _is_sliding(mask_function, local_size):
        return sdpa_mask(
            batch_size=batch_size,
            q_length=q_length,
            kv_length=kv_length,
            mask_function=mask_function,
            attention_mask=attention_mask,
            **options | {"allow_is_causal_skip": False},
        )
    if attention_mask is None or not any(attention_mask.stride()):  # `no_padding`
        return None
    if attention_mask.shape[1] == 0:
        raise UserError("attention_mask has no columns: leave it out, or pass (batch, tokens)")
    if q_length == 1 and kv_length > 1:
        return None  # a decode step: the cache counts the padding
    if kv_length != q_length:  # there is a cache, which must know of all padding
        return None if bool(attention_mask.all()) else attention_mask.bool()
    starts = attention_mask.to(torch.int8).diff(dim=-1) > 0  # real tokens after padding
    if bool(attention_mask[:, 0].all()) and not bool(starts.any()):
        return None
    return attention_mask.bool()


def _is_sliding(mask_function: Callable[..., Any], size: int | None) -> bool:
    """Distinguish a sliding window from other local patterns by a pair of tokens that chunks of that size separate."""
    if size is None or size < 2:
        return False
    zero, query = torch.tensor(0), torch.tensor(size)
    return bool(mask_function(zero, zero, query, query - 1)) and not bool(mask_function(zero, zero, query, zero))


def real_first(mask: Tensor) -> Tensor:
    """The order (batch, tokens) that puts each sample's real tokens before its padding, for `reorder`."""
    return (~mask).to(torch.int8).argsort(dim=-1, stable=True)


def reorder(x: Tensor, order: Tensor) -> Tensor:
    """The tokens of each sample of (batch, heads, tokens, dim) in an order (batch, n), whose indices may repeat."""
    return x.gather(2, order[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))
