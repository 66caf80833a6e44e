"""Codes of keys and values, number by number against plain Python."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from duo_id.attention.choices import KV_FORMATS
from duo_id.attention.codes import (
    FORMATS,
    GROUP,
    Bits,
    bits_of,
    dequantise_keys,
    dequantise_values,
    kept_bytes,
    quantise_keys,
    quantise_values,
)
from duo_id.common.errors import UserError

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
bits_each = pytest.mark.parametrize("bits", [4, 8])
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def numbers(dtype: torch.dtype, *shape: int) -> Tensor:
    """Random, with a level and a spread of its own in each channel; one channel is constant, one token is 0."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(*shape, generator=generator) * (1 + torch.arange(shape[-1])) + 20 * torch.arange(shape[-1])
    x[..., 1] = 2.5
    x[..., 5, :] = 0
    return x.to(dtype)


def codes_by_hand(x: list[float], bits: int, dtype: torch.dtype) -> tuple[list[int], float, float]:
    """Codes, scale and zero of numbers that share these; every step is rounded to float32, the scale to its type."""
    single, levels = np.float32, 2**bits - 1
    low, high = single(min(x)), single(max(x))
    scale = float(torch.tensor(float((high - low) * single(1 / levels))).to(dtype))
    divisor = single(scale if scale else 1)
    codes = [math.floor(single((single(number) - low) / divisor) + single(0.5)) for number in x]
    return [min(max(code, 0), levels) for code in codes], scale, float(low)


@bits_each
@dtypes
def test_keys_bit_by_bit(bits: int, dtype: torch.dtype) -> None:
    x = numbers(dtype, 2, 16, 6)
    codes, scales = quantise_keys(x, bits, 8)
    assert codes.shape == (2, 2, bits // 4, 8, 3)
    assert scales.shape == (2, 2, 6, 2)
    assert scales.dtype == dtype
    meant = dequantise_keys(codes, scales)
    for head, group, channel in np.ndindex(2, 2, 6):
        part = x[head, group * 8 : group * 8 + 8, channel].double().tolist()
        wanted, scale, zero = codes_by_hand(part, bits, dtype)
        assert scales[head, group, channel].tolist() == [scale, zero]
        stored = codes[head, group, -1 if channel >= 3 else 0, :, channel % 3]
        found = stored if bits == 8 else stored >> 4 if channel >= 3 else stored & 15
        assert found.tolist() == wanted
        single = np.float32
        back = torch.tensor([float(single(code) * single(scale) + single(zero)) for code in wanted]).to(dtype)
        assert torch.equal(meant[head, group * 8 : group * 8 + 8, channel], back)


@bits_each
@dtypes
def test_values_bit_by_bit(bits: int, dtype: torch.dtype) -> None:
    x = numbers(dtype, 2, 16, 6)
    codes, scales = quantise_values(x, bits, 8)
    assert codes.shape == (2, 2, bits // 4, 3, 8)
    assert scales.shape == (2, 2, 8, 2)
    meant = dequantise_values(codes, scales)
    assert meant.is_contiguous()
    for head, token in np.ndindex(2, 16):
        wanted, scale, zero = codes_by_hand(x[head, token].double().tolist(), bits, dtype)
        group, place = divmod(token, 8)
        assert scales[head, group, place].tolist() == [scale, zero]
        planes = codes[head, group, :, :, place]
        found = planes.flatten() if bits == 8 else torch.cat([planes[0] & 15, planes[0] >> 4])
        assert found.tolist() == wanted
        single = np.float32
        back = torch.tensor([float(single(code) * single(scale) + single(zero)) for code in wanted]).to(dtype)
        assert torch.equal(meant[head, token], back)


@bits_each
@dtypes
def test_a_number_is_off_by_half_a_step_and_by_what_the_scale_is_rounded(bits: int, dtype: torch.dtype) -> None:
    x = numbers(dtype, 3, 2 * GROUP, 64)
    scales, meant = quantise_keys(x, bits, GROUP)[1], dequantise_keys(*quantise_keys(x, bits, GROUP))
    step = scales[..., 0].float().repeat_interleave(GROUP, 1)
    rounded = (2**bits - 1) * torch.finfo(dtype).eps / 2
    allowed = step * (0.5 + rounded) + torch.finfo(dtype).eps * x.float().abs()
    assert ((meant.float() - x.float()).abs() <= allowed * (1 + 1e-5)).all()


def test_formats() -> None:
    assert tuple(FORMATS) == KV_FORMATS
    assert [bits_of(kv) for kv in KV_FORMATS] == [None, Bits(8, 8), Bits(8, 4), Bits(4, 4)]
    for kv in ("bf16", None, 4):
        with pytest.raises(UserError, match="choose one of exact, int8, k8v4, int4"):
            bits_of(kv)  # type: ignore[arg-type]


def test_bytes_of_a_head() -> None:
    """As counted in tensors, with what remains of a group exactly."""
    for kv, bits in FORMATS.items():
        if bits is None:
            assert kept_bytes(1000, 64, 2, bits) == 2 * 1000 * 64 * 2
            continue
        x = torch.zeros(1, 7 * GROUP, 64, dtype=torch.bfloat16)
        coded = (*quantise_keys(x, bits.keys, GROUP), *quantise_values(x, bits.values, GROUP))
        assert kept_bytes(7 * GROUP + 5, 64, 2, bits) == sum(y.nbytes for y in coded) + 2 * 5 * 64 * 2, kv
