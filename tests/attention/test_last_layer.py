"""The last layer at some tokens alone gives what it gives at all, and does no more than that."""

import itertools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from duo_id.attention.blends import BLENDS
from duo_id.attention.full import full_attention
from duo_id.attention.last_layer import AtRows, last_layer, scatter_rows
from duo_id.attention.layers import BOUND
from duo_id.attention.softmax import Softmax
from duo_id.attention.streaming import streaming_attention
from duo_id.attention.window import Window
from duo_id.step.compiled import compiled_parts
from duo_id.step.distillation import Distillation
from duo_id.step.recompute import Keep, activation_checkpointing
from tests.step.test_distillation import HYBRID, batch_of, distilling, gates_of
from tests.support.planted import random_sample

MakeModel = Callable[..., PreTrainedModel]
ROWS = torch.tensor([0, 7, 7, 30, 49])
SCORED = 4  # of a sample of 130 tokens


@pytest.mark.parametrize("softmax", [Softmax(), Softmax(0.3, 5.0), Softmax(sinks=torch.tensor([0.5, -1, 2, 0]))])
@pytest.mark.parametrize("window", [None, Window(2, 8), Window(0, 5), Window(30, 30)])
def test_queries_anywhere_see_what_they_see_among_all(softmax: Softmax, window: Window | None) -> None:
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, heads, 50, 8, generator=generator) for heads in (4, 2, 2))

    def attend(query: Tensor, rows: Tensor | None) -> Tensor:
        if window is None:
            return full_attention(query, key, value, softmax, rows=rows)
        return streaming_attention(query, key, value, softmax, window, rows=rows)

    torch.testing.assert_close(attend(query[:, :, ROWS], ROWS), attend(query, None)[:, :, ROWS])


def test_rows_are_spread_to_their_places_and_get_their_gradients_once() -> None:
    found = torch.arange(1.0, 6.0)[:, None].requires_grad_()
    out = scatter_rows(found, ROWS, 50, 0)
    assert out[ROWS, 0].tolist() in ([1, 2, 2, 4, 5], [1, 3, 3, 4, 5])
    assert torch.count_nonzero(out) == 4
    (gradient,) = torch.autograd.grad(out.sum(), found)
    assert sorted(gradient[1:3, 0].tolist()) == [0, 1]
    assert gradient[[0, 3, 4], 0].tolist() == [1, 1, 1]


def loss_and_gradient(distillation: Distillation, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
    layers = distillation.gated_model.layers
    alpha = gates_of(len(layers), layers[0].kv_heads).requires_grad_()
    loss = distillation.loss(alpha, batch)
    return loss.detach(), torch.autograd.grad(loss, alpha)[0]


@contextmanager
def seen_by_the_last(distillation: Distillation, mlp: str = "mlp") -> Iterator[dict[str, set[int]]]:
    """How many tokens the MLP of the last block, and how many queries its attention, are given."""
    layer, seen = distillation.gated_model.layers[-1], {"mlp": set[int](), "queries": set[int]()}
    block = distillation.gated_model.model.model.get_submodule(layer.name.rsplit(".", 1)[0])
    inner = next(module for name, module in block.get_submodule(mlp).named_modules() if name)
    hook = inner.register_forward_pre_hook(lambda module, given: seen["mlp"].add(given[0].shape[1]))
    plain = AtRows.__call__

    def call(self: AtRows, query: Tensor, *given: Any) -> Tensor:
        seen["queries"].add(len(self.rows))
        return plain(self, query, *given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AtRows, "__call__", call)
        yield seen
    hook.remove()


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "phi", "phi3", "gemma", "qwen3", "stablelm", "qwen2"])
@pytest.mark.parametrize("objective", ["hidden_l2", "layer_l2", "kl"])
def test_a_step_is_the_same_and_its_last_layer_computes_the_scored_tokens_alone(
    family: str, objective: str, make_model: MakeModel
) -> None:
    batch = batch_of(random_sample(130, 1, SCORED))
    with distilling(make_model(family), objective) as distillation:
        with seen_by_the_last(distillation) as seen:
            loss, gradient = loss_and_gradient(distillation, batch)
        rows = 2 * SCORED if objective == "kl" else SCORED  # logits are of the tokens before
        assert seen == {"mlp": {rows}, "queries": {rows}}
        distillation.last = None
        expected, expected_gradient = loss_and_gradient(distillation, batch)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-5, atol=1e-5 * float(expected_gradient.abs().max()))
    assert gradient[-1].abs().max() > 1e-6


@pytest.mark.parametrize(
    ("how", "tokens"),
    [
        *itertools.product(["kept", "ATTENTION", "OUTPUT", "INPUT"], ["labelled", "far"]),
        ("compiled", "labelled"),
        ("compiled OUTPUT", "far"),
    ],
)
def test_whatever_the_blend_and_the_way(tokens: str, how: str, make_model: MakeModel) -> None:
    """For every blend; graphs compiled for the first serve the others."""
    model = make_model("llama", num_hidden_layers=2 if "compiled" in how else 3)
    batch = batch_of(random_sample(130, 1, SCORED))
    with distilling(model, "kl", tokens=tokens) as distillation:
        layers, last, expected, found = distillation.gated_model.layers, distillation.last, {}, {}
        distillation.last = None
        for blend in BLENDS:
            distillation.blend = BLENDS[blend]
            expected[blend] = loss_and_gradient(distillation, batch)
        distillation.last = last
        with ExitStack() as stack:
            if "compiled" in how:
                given = {
                    "dynamic": how == "compiled",
                    "backend": "eager",
                }  # one of the two with a graph for each length
                stack.enter_context(compiled_parts(model, layers, attention=True, **given))
            if how.split()[-1] in Keep.__members__:
                stack.enter_context(activation_checkpointing(model, layers, Keep[how.split()[-1]]))
            for blend in BLENDS:
                distillation.blend = BLENDS[blend]
                found[blend] = loss_and_gradient(distillation, batch)
    for blend, (_, gradient) in expected.items():
        largest = float(gradient.abs().max())
        torch.testing.assert_close(found[blend], expected[blend], rtol=1e-5, atol=1e-5 * largest)


def test_an_mlp_that_tells_its_routing_too(make_model: MakeModel) -> None:
    """Experts behind sinks: the MLP returns a pair."""
    model = make_model("gpt_oss", layer_types=["full_attention"] * 3, num_local_experts=4, num_experts_per_tok=2)
    batch = batch_of(random_sample(130, 1, SCORED))
    with distilling(model) as distillation:
        with seen_by_the_last(distillation) as seen:
            found = loss_and_gradient(distillation, batch)
        assert seen["queries"] == {SCORED}
        distillation.last = None
        expected = loss_and_gradient(distillation, batch)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * float(expected[1].abs().max()))


@pytest.mark.parametrize("scored", [3, 12])
def test_many_scored_tokens_or_padding_leave_the_last_layer_whole(scored: int, make_model: MakeModel) -> None:
    samples = [random_sample(100, 1, scored), random_sample(90, 2, 3)]
    with distilling(make_model("llama")) as distillation, seen_by_the_last(distillation) as seen:
        loss_and_gradient(distillation, batch_of(*(samples if scored == 3 else samples[:1])))
    assert seen == {"mlp": {100}, "queries": set()}


def test_a_model_that_ends_in_another_layer_is_left_alone(make_model: MakeModel) -> None:
    model = make_model("gemma3_text", **HYBRID)
    with distilling(model) as distillation:
        assert distillation.last is None
        assert last_layer(model, distillation.gated_model.layers) is None
        functions = [getattr(layer.module, BOUND) for layer in distillation.gated_model.layers]
        assert not any(isinstance(function, AtRows) for function in functions)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("blend", ["student", "teacher"])
def test_on_a_device(blend: str, dtype: torch.dtype, device: str, make_model: MakeModel) -> None:
    """Within what rounding alone changes: in bfloat16 the fast kernels and the dense ones round otherwise."""
    model = make_model("llama", head_dim=32, hidden_size=64, max_position_embeddings=4096).to(device, dtype)
    batch = {key: value.to(device) if torch.is_tensor(value) else value for key, value in
             batch_of(random_sample(2000, 1, 30)).items()}  # fmt: skip
    with distilling(model, "hidden_l2", blend) as distillation:
        alpha = gates_of(3, 2).to(device).requires_grad_()
        losses = []
        for last in (distillation.last, None):
            distillation.last = last
            loss = distillation.loss(alpha, batch)
            losses.append((loss.detach(), torch.autograd.grad(loss, alpha)[0]))
    rtol = 1e-4 if dtype == torch.float32 else 0.05
    torch.testing.assert_close(losses[0], losses[1], rtol=rtol, atol=rtol * float(losses[1][1].abs().max()))
