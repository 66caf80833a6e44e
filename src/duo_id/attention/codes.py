"""Keys and values in 8 or 4 bits: groups of tokens as codes, with a scale and a zero for each channel or token.

Channels of keys have their own levels and spreads, above all where the projection has a bias; those of values have not.
So for keys a channel has a scale and a zero for the tokens of a group, and for values a token has them for its channels
(KIVI, arXiv 2402.02750, section 3). A number x becomes the code round((x - zero) / scale), from 0 to 2**bits - 1, where
zero is the smallest number that shares it, and scale the range over 2**bits - 1.

Both are kept in the model's own type, in which zero is exact because it is one of the numbers, and codes are found from
the scale as it is kept. So only the scale's rounding adds to the half step by which a number is off: 2**-9 of the range
at most in bfloat16, which is half a step more for 8 bits and a thirtieth for 4.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from duo_id.attention.choices import KV_FORMATS
from duo_id.common.errors import UserError, check

GROUP = 128  # tokens whose codes are written together


class Bits(NamedTuple):
    """How many bits the codes of keys and of values have, 8 or 4."""

    keys: int
    values: int


FORMATS: dict[str, Bits | None] = dict(zip(KV_FORMATS, (None, Bits(8, 8), Bits(8, 4), Bits(4, 4)), strict=True))


Kv = str | Sequence[str]  # a format for all layers, or one for each


def bits_of(kv: str) -> Bits | None:
    """The bits of a format by its name; None: the model's own type.

    Raises:
        UserError: there is no such format.
    """
    if not isinstance(kv, str) or kv not in FORMATS:
        raise UserError(f"kv={kv!r:.80}: choose one of {', '.join(FORMATS)}")
    return FORMATS[kv]


def bits_by_layer(kv: Kv, layers: int) -> list[Bits | None]:
    """The bits of each layer: those of one format for all of them, or of a format for each.

    Raises:
        UserError: there is no such format, or there are more or fewer formats than layers.
    """
    if not isinstance(kv, list | tuple):
        return [bits_of(kv)] * layers  # type: ignore[arg-type]  # what is no name is refused there
    check(len(kv) == layers, f"kv has {len(kv)} formats for {layers} layers: give one for each, or a single name")
    return [bits_of(name) for name in kv]


def kept_bytes(tokens: int, dim: int, itemsize: int, bits: Bits | None, group: int | None = None) -> int:
    """Bytes of the keys and values of one head: codes and scales of whole groups, and numbers of all other tokens.

    Args:
        tokens: of the head.
        dim: its width.
        itemsize: bytes of a number.
        bits: of codes; None: there are none.
        group: tokens of a group; None: `GROUP`.
    """
    if bits is None:
        return 2 * tokens * dim * itemsize
    group = GROUP if group is None else group
    each = group * dim * (bits.keys + bits.values) // 8 + 2 * (dim + group) * itemsize
    return tokens // group * each + 2 * (tokens % group) * dim * itemsize


def quantise(x: Tensor, bits: int, dim: int) -> tuple[Tensor, Tensor]:
    """Codes of numbers that share scale and zero along a dimension.

    Args:
        x: floating-point.
        bits: of a code.
        dim: over which scale and zero are shared.

    Returns:
        codes, uint8, the shape of x, and (..., 2), of x's type, without `dim`: scale and zero.
    """
    levels = 2**bits - 1
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    low, high = wide.aminmax(dim=dim, keepdim=True)
    scale = ((high - low) * (1 / levels)).to(x.dtype)
    divisor = torch.where(scale == 0, 1, scale).to(wide.dtype)  # all numbers are equal: each is the zero
    codes = ((wide - low) / divisor + 0.5).floor_().clamp_(0, levels).to(torch.uint8)
    return codes, torch.stack([scale, low.to(x.dtype)], -1).squeeze(dim - 1)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes (..., 2, n), of two halves of the channels, as bytes (planes, ..., n).

    With 8 bits a byte has one code, and each half is a plane; with 4 it has a code of each half, the first in its lower
    bits, and there is one plane. So kernels get contiguous halves of either, and interleave nothing.
    """
    low, high = codes.unbind(-2)
    return torch.stack([low, high]) if bits == 8 else (low | high << 4)[None]


def unpack(packed: Tensor, dtype: torch.dtype) -> Tensor:
    """The codes (..., 2, n) in bytes (planes, ..., n), as numbers of a type."""
    low, high = packed if len(packed) == 2 else (packed[0] & 15, packed[0] >> 4)
    return torch.stack([low, high], -2).to(dtype)


def quantise_keys(key: Tensor, bits: int, group: int) -> tuple[Tensor, Tensor]:
    """Codes of keys (..., tokens, head_dim), a multiple of `group` tokens, whose scales are those of a channel.

    Returns:
        codes (..., groups, planes, group, head_dim / 2) uint8, and scale and zero of each channel,
        (..., groups, head_dim, 2).
    """
    codes, scales = quantise(key.unflatten(-2, (-1, group)), bits, -2)
    return pack(codes.unflatten(-1, (2, -1)), bits).movedim(0, -3), scales


def quantise_values(value: Tensor, bits: int, group: int) -> tuple[Tensor, Tensor]:
    """Codes of values (..., tokens, head_dim), a multiple of `group` tokens, whose scales are those of a token.

    Returns:
        codes (..., groups, planes, head_dim / 2, group) uint8, tokens last, as the product with weights reads them, and
        scale and zero of each token, (..., groups, group, 2).
    """
    codes, scales = quantise(value.unflatten(-2, (-1, group)).mT, bits, -2)
    halves = codes.unflatten(-2, (2, -1)).movedim(-3, -2)  # (..., groups, head_dim / 2, 2, group)
    return pack(halves, bits).movedim(0, -3), scales


def dequantise_keys(codes: Tensor, scales: Tensor) -> Tensor:
    """The keys (..., tokens, head_dim), of the type of their scales, that `quantise_keys` made codes of."""
    scale, zero = _wide(scales).unsqueeze(-3).unbind(-1)
    numbers = unpack(codes.movedim(-3, 0), scale.dtype).flatten(-2)
    return (numbers * scale + zero).to(scales.dtype).flatten(-3, -2)


def dequantise_values(codes: Tensor, scales: Tensor) -> Tensor:
    """The values (..., tokens, head_dim), of the type of their scales, that `quantise_values` made codes of."""
    scale, zero = _wide(scales).unsqueeze(-3).unbind(-1)
    numbers = unpack(codes.movedim(-3, 0), scale.dtype).movedim(-2, -3).flatten(-3, -2)
    return (numbers * scale + zero).to(scales.dtype).mT.contiguous().flatten(-3, -2)


def _wide(scales: Tensor) -> Tensor:
    return scales.to(torch.promote_types(scales.dtype, torch.float32))
