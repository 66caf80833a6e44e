"""Compiled layers: the same numbers, and a handful of graphs however many layers and lengths there are."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from transformers import PreTrainedModel

from duo_id.attention.gated import attached
from duo_id.compiled import compiled_parts
from tests.planted import random_sample
from tests.test_distillation import batch_of, distilling, gates_of

HIDDEN = 32  # of the tiny models


def results(model: PreTrainedModel, lengths: list[int], backend: Any, blend: str = "student") -> list[Any]:
    found = []
    with distilling(model, "hidden_l2", blend) as distillation:
        layers = distillation.layers
        with compiled_parts(model, layers, attention=True, backend=backend):
            for length in lengths:
                alpha = gates_of(len(layers), layers[0].kv_heads).requires_grad_()
                loss = distillation.loss(alpha, batch_of(random_sample(length, length)))
                found.append((loss.detach(), *torch.autograd.grad(loss, alpha)))
    return found


@pytest.mark.parametrize(("family", "more"), [("llama", range(40, 89)), ("gpt_neox", range(40, 43))])
def test_graphs_grow_neither_with_layers_nor_with_lengths(
    family: str, more: range, make_model: Callable[..., PreTrainedModel]
) -> None:
    """The first length is that of the hidden size, which must not be taken for the same number."""
    counts = []
    for layers, lengths in ((2, [HIDDEN]), (4, [HIDDEN]), (2, [HIDDEN, *more])):
        counter = CompileCounter()
        results(make_model(family, num_hidden_layers=layers), lengths, counter)
        counts.append(counter.frame_count)
    assert len(set(counts)) == 1, counts
    # The first layer's input has no gradient, and the teacher's pass has none: three variants of four to six parts.
    assert 8 <= counts[0] <= 18, counts


@pytest.mark.parametrize("blend", ["student", "teacher", "detached"])
def test_compiled_layers_give_the_same_gradients(blend: str, make_model: Callable[..., PreTrainedModel]) -> None:
    model = make_model("llama")
    with distilling(model, "hidden_l2", blend) as distillation:
        alpha = gates_of(3, 2).requires_grad_()
        loss = distillation.loss(alpha, batch_of(random_sample(61, 61)))
        expected = (loss.detach(), *torch.autograd.grad(loss, alpha))
    torch.testing.assert_close(results(model, [61], "aot_eager", blend)[0], expected, rtol=1e-5, atol=1e-7)


def test_the_model_is_as_before_afterwards(make_model: Callable[..., PreTrainedModel]) -> None:
    model = make_model("llama")
    with attached(model) as layers, compiled_parts(model, layers, attention=True, backend="eager"):
        assert sum("forward" in part.__dict__ for part in model.modules()) == 4 * 3
    assert not any("forward" in part.__dict__ for part in model.modules())
