"""Full attention that is noted is given again without being computed, with the gradient that it has."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from duo_id.attention.full import full_attention
from duo_id.attention.memo import OPERATORS, Memo
from duo_id.attention.softmax import Softmax


class Calls(TorchDispatchMode):
    """Counts calls of the operators that a memo answers."""

    def __init__(self) -> None:
        super().__init__()
        self.number = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.number += func in OPERATORS
        return func(*args, **(kwargs or {}))


@contextmanager
def counted() -> Iterator[Calls]:
    with Calls() as calls:
        yield calls


def attended(device: str, heads: int = 4) -> tuple[list[Tensor], Tensor]:
    generator = torch.Generator().manual_seed(3)
    dtype = torch.float32 if device == "cpu" else torch.bfloat16  # what a fast backend there knows
    query, key, value = (torch.randn(1, n, 37, 16, generator=generator).to(device, dtype) for n in (heads, 2, 2))
    inputs = [x.requires_grad_() for x in (query, key, value)]
    return inputs, full_attention(*inputs, Softmax())


def gradients(inputs: list[Tensor], out: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(out, inputs, torch.ones_like(out).cumsum(2))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_the_same_calls_are_answered_with_their_gradients(device: str) -> None:
    expected = [gradients(*attended(device, heads)) for heads in (4, 2)]
    memo = Memo()
    with counted() as calls:
        with memo.noting(replay=False):
            first = [attended(device, heads) for heads in (4, 2)]
        assert calls.number == 2 == len(memo.results)
        for _ in range(2):  # a graph that is kept is computed again as often as it is asked
            with memo.noting(replay=True):
                second = [attended(device, heads) for heads in (4, 2)]
        assert calls.number == 2, "nothing was computed again"
    for inputs_and_out, wanted in zip([*first, *second], [*expected, *expected], strict=True):
        torch.testing.assert_close(gradients(*inputs_and_out), wanted)


def test_other_calls_than_those_noted_are_computed() -> None:
    memo = Memo()
    with memo.noting(replay=False):
        pass
    attended("cpu")
    assert not memo.results
    with memo.noting(replay=False), pytest.raises(ZeroDivisionError):
        _ = 1 / 0
    with counted() as calls:
        attended("cpu")
    assert calls.number == 1
    assert not memo.results, "a block that fails leaves nothing behind"
