"""The part of transformers' attention masks that matters here, padding: every layer knows its own pattern."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.masking_utils import causal_mask_function, sdpa_mask

from duo_id.common.errors import UserError


def no_padding(ids: Tensor) -> Tensor:
    """An attention mask for `ids` (batch, tokens) that says, without a look at the device, that all tokens are real.

    Its one element lies under all places, which `padding_mask` knows by the strides. Given no mask at all,
    transformers looks for packed sequences, which waits for the device.
    """
    return torch.ones((), dtype=torch.bool, device=ids.device).expand(ids.shape)


def first_position(model: nn.Module) -> int:
    """The position of a text's first token: 0, but in a model whose table of positions has an entry for padding."""
    tables = (part for name, part in model.named_modules() if name.endswith("position_embeddings"))
    return next((x.padding_idx + 1 for x in tables if getattr(x, "padding_idx", None) is not None), 0)


def padding_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    **rest: Any,
) -> Tensor | None:
    """What transformers calls to make the mask: only the padding is handed on, for the rest is in each layer.

    Returns:
        (batch, tokens) bool, True for real tokens, if a sample is padded where that matters; None if causality is
        enough. A layer with a pattern of its own that is neither causal nor a sliding window gets that as a dense mask.
    """
    if mask_function is not causal_mask_function and not _is_sliding(mask_function, local_size):
        return sdpa_mask(
            batch_size=batch_size,
            q_length=q_length,
            kv_length=kv_length,
            mask_function=mask_function,
            attention_mask=attention_mask,
            **rest | {"allow_is_causal_skip": False},
        )
    if attention_mask is None or not any(attention_mask.stride()):  # `no_padding`
        return None
    if attention_mask.shape[1] == 0:
        raise UserError("attention_mask has no columns: leave it out, or give (batch, tokens)")
    if q_length == 1 and kv_length > 1:
        return None  # a decode step: the cache counts the padding
    if kv_length != q_length:  # there is a cache, which must know of all padding
        return None if bool(attention_mask.all()) else attention_mask.bool()
    begins = attention_mask.to(torch.int8).diff(dim=-1) > 0  # real tokens after padding
    if bool(attention_mask[:, 0].all()) and not bool(begins.any()):
        return None
    return attention_mask.bool()


def _is_sliding(mask_function: Callable[..., Any], size: int | None) -> bool:
    """Tell a sliding window from other local patterns by a pair of tokens that chunks of that size would part."""
    if size is None or size < 2:
        return False
    zero, query = torch.tensor(0), torch.tensor(size)
    return bool(mask_function(zero, zero, query, query - 1)) and not bool(mask_function(zero, zero, query, zero))


def real_first(mask: Tensor) -> Tensor:
    """The order (batch, tokens) that puts each sample's real tokens before its padding, for `ordered`."""
    return (~mask).to(torch.int8).argsort(dim=-1, stable=True)


def ordered(x: Tensor, order: Tensor) -> Tensor:
    """The tokens of each sample of (batch, heads, tokens, dim) in an order (batch, n), whose numbers may come again."""
    return x.gather(2, order[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))
