"""Compiled layers: the same numbers, and a handful of graphs however many layers and lengths there are."""

import sys
from collections.abc import Callable
from itertools import combinations

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter, CompileCounterWithBackend
from transformers import PreTrainedModel

from duo_id import dual_cache, duo_attention, prefill
from duo_id.attention.blends import BLENDS
from duo_id.attention.interface import attached
from duo_id.deploy.install import deployment_of
from duo_id.patterns.pattern import HeadMask
from duo_id.step.compiled import compiled_parts
from duo_id.step.distillation import Distillation
from tests.step.test_distillation import batch_of, distilling, gates_of
from tests.support.planted import random_sample

HIDDEN = 32  # of the tiny models
LENGTHS = (40, 41, 47, 48, 49, 63, 64, 65, 79, 80, 81, 87)  # odd and even, around sizes of blocks


def loss_and_gradient(distillation: Distillation, length: int) -> tuple[Tensor, Tensor]:
    layers = distillation.gated_model.layers
    alpha = gates_of(len(layers), layers[0].kv_heads).requires_grad_()
    loss = distillation.loss(alpha, batch_of(random_sample(length, length)))
    (gradient,) = torch.autograd.grad(loss, alpha)
    return loss.detach(), gradient


@pytest.mark.parametrize(("family", "more_layers"), [("llama", (4,)), ("gpt_neox", ())], ids=str)
def test_graphs_grow_neither_with_layers_nor_with_lengths(
    family: str, more_layers: tuple[int, ...], make_model: Callable[..., PreTrainedModel]
) -> None:
    """The first length equals the hidden size, with which it must not be identified.

    In the second, scored tokens are few enough for the last layer to compute only them.
    """
    counts = []
    for layers, lengths in ((2, [HIDDEN, 88, *LENGTHS]), *((more, [HIDDEN, 88]) for more in more_layers)):
        model, counter = make_model(family, num_hidden_layers=layers), CompileCounter()
        with (
            distilling(model, "hidden_l2") as distillation,
            compiled_parts(model, distillation.gated_model.layers, attention=True, backend=counter),
        ):
            for length in lengths:
                loss_and_gradient(distillation, length)
                if length != HIDDEN:
                    counts.append(counter.frame_count)
    assert len(set(counts)) == 1, counts
    # The first layer's input has no gradient, and the teacher's pass has none: three variants of four to six parts.
    assert 8 <= counts[0] <= 18, counts


def test_compiled_layers_give_the_same_gradients(make_model: Callable[..., PreTrainedModel]) -> None:
    """For every blend: graphs compiled for the first serve the others, and none may fall back to eager code.

    `tests/attention/test_last_layer.py` has an objective on logits.
    """
    model = make_model("llama", num_hidden_layers=2)
    with distilling(model, "hidden_l2") as distillation:
        expected, compiled = {}, {}
        for blend in BLENDS:
            distillation.blend = BLENDS[blend]
            expected[blend] = loss_and_gradient(distillation, 61)
        counter = CompileCounterWithBackend("aot_eager")
        with (
            torch._dynamo.config.patch(fail_on_recompile_limit_hit=True),
            compiled_parts(model, distillation.gated_model.layers, attention=True, backend=counter),
        ):
            for blend in BLENDS:
                distillation.blend = BLENDS[blend]
                compiled[blend] = loss_and_gradient(distillation, 61)
        assert counter.frame_count >= 8
    torch.testing.assert_close(compiled, expected, rtol=1e-5, atol=1e-7)
    gradients = [gradient for _, gradient in expected.values()]
    assert not any(torch.allclose(*pair, rtol=1e-3) for pair in combinations(gradients, 2)), "blends that are the same"


def test_the_rotation_is_compiled_where_attention_is_not(make_model: Callable[..., PreTrainedModel]) -> None:
    """Norms, MLP and rotation are a graph each; prefill under a mask gives the same logits with them."""
    model, ids = make_model("llama"), torch.arange(40)[None]
    mask = HeadMask(torch.tensor([[True, False], [False, False], [False, True]]), 2, 8)
    module = sys.modules[type(model).__module__]
    plain = module.apply_rotary_pos_emb
    counter = CompileCounterWithBackend("aot_eager")
    with duo_attention(model, mask), torch.no_grad():
        expected = prefill(model, ids, dual_cache(model), 16)
        with (
            torch._dynamo.config.patch(fail_on_recompile_limit_hit=True),
            compiled_parts(model, deployment_of(model).layers, dynamic=False, backend=counter),
        ):
            assert module.apply_rotary_pos_emb is not plain
            found = prefill(model, ids, dual_cache(model), 16)
    assert module.apply_rotary_pos_emb is plain
    assert counter.frame_count == 2 * 3, "of chunks of 16 tokens, and the last of 8"
    torch.testing.assert_close(found, expected)


def test_the_model_is_restored_afterwards(make_model: Callable[..., PreTrainedModel]) -> None:
    model = make_model("llama")
    with attached(model) as layers, compiled_parts(model, layers, attention=True, backend="eager"):
        assert sum("forward" in part.__dict__ for part in model.modules()) == 4 * 3
    assert not any("forward" in part.__dict__ for part in model.modules())
