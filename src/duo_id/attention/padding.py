"""The part of transformers' attention masks that matters here, padding: every layer knows its own pattern."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.masking_utils import causal_mask_function, sdpa_mask

from duo_id.errors import UserError


def no_padding(ids: Tensor) -> Tensor:
    """An attention mask for `ids` (batch, tokens) that says, without a look at the device, that all tokens are real.

    Its one element lies under all places, which `padding_mask` knows by the strides. Given no mask at all,
    transformers looks for packed sequences, which waits for the device.
    """
    return torch.ones((), dtype=torch.bool, device=ids.device).expand(ids.shape)


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
    if q_length == 1 and kv_length > 1:
        return None  # a decode step: the cache counts the padding, and does so without a look
    if not bool(_contiguous(attention_mask).all()):
        raise UserError("the attention mask has holes: each sample's real tokens must be in one piece")
    cached = kv_length != q_length  # a static cache must know of padding on the right too
    harmless = attention_mask if cached else attention_mask[:, 0]
    return None if bool(harmless.all()) else attention_mask.bool()


def _contiguous(mask: Tensor) -> Tensor:
    """(batch,) bool: whether the real tokens of each row of (batch, tokens) form one piece at most."""
    padded = F.pad(mask.to(torch.int8), (1, 0))
    return (padded.diff(dim=-1) > 0).sum(-1) <= 1


def _is_sliding(mask_function: Callable[..., Any], size: int | None) -> bool:
    """Tell a sliding window from other local patterns by a pair of tokens that chunks of that size would part."""
    if size is None or size < 2:
        return False
    zero, query = torch.tensor(0), torch.tensor(size)
    return bool(mask_function(zero, zero, query, query - 1)) and not bool(mask_function(zero, zero, query, zero))


def rolled(x: Tensor, start: Tensor) -> Tensor:
    """Rotate the tokens of each sample of (batch, heads, tokens, dim) so that token `start[sample]` comes first."""
    tokens = x.shape[2]
    index = (torch.arange(tokens, device=x.device) + start[:, None]) % tokens
    return x.gather(2, index[:, None, :, None].expand_as(x))
