"""Attention over a context in parts is attention over all of it."""

import pytest
import torch

from duo_id.attention.full import attention_in_parts, full_attention
from duo_id.attention.softmax import Softmax

SOFTMAXES = {
    "plain": Softmax(),
    "scale": Softmax(0.4),
    "cap": Softmax(0.4, 1.5),
    "sinks": Softmax(None, None, torch.linspace(-1, 3, 6)),
}


@pytest.mark.parametrize("name", SOFTMAXES)
@pytest.mark.parametrize("edges", [[0, 40], [0, 33, 40], [0, 1, 9, 20, 33, 40]], ids=str)
def test_parts_are_the_whole(edges: list[int], name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, heads, 40, 16, generator=generator) for heads in (6, 2, 2))
    start = edges[-2]
    own, *past = [
        (key[:, :, a:b], value[:, :, a:b]) for a, b in zip(edges[-2::-1], edges[:0:-1], strict=True)
    ]  # the latest first
    found = attention_in_parts(query[:, :, start:], iter([own, *past]), SOFTMAXES[name])
    wanted = full_attention(query[:, :, start:], key, value, SOFTMAXES[name])
    torch.testing.assert_close(found, wanted, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("name", SOFTMAXES)
def test_a_part_that_nobody_sees_counts_for_nothing(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, heads, 3, 16, generator=generator) for heads in (6, 2, 2))
    out, log_sum = SOFTMAXES[name].attend_part(query, key, value, torch.zeros(3, 3, dtype=torch.bool))
    assert out.eq(0).all()
    assert log_sum.eq(-torch.inf).all()
