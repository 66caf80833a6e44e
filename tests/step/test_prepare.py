"""The fast step, under every plan, and the published shape: loss and gradients of the simple step."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from duo_id.attention.blends import BLENDS
from duo_id.common.errors import UserError
from duo_id.methods.settings import GateSettings
from duo_id.step import prepare
from duo_id.step.paper_shape import PaperShape
from duo_id.step.prepare import prepared_step
from duo_id.step.recompute import Keep
from duo_id.step.settings import StepSettings
from tests.step.test_distillation import batch_of, distilling, gates_of
from tests.support.planted import random_sample


def step(distillation: Any, batch: dict[str, Any]) -> tuple[torch.Tensor, ...]:
    layers = distillation.gated_model.layers
    alpha = gates_of(len(layers), layers[0].kv_heads).requires_grad_()
    loss = distillation.loss(alpha, batch)
    return loss.detach(), *torch.autograd.grad(loss, alpha)


@pytest.mark.parametrize("family", ["llama", "stablelm"])
@pytest.mark.parametrize("blend", BLENDS)
@pytest.mark.parametrize(("objective", "tokens"), [("hidden_l2", "labelled"), ("layer_l2", "labelled"), ("kl", "far")])
def test_the_published_shape_is_the_same_step(
    family: str, blend: str, objective: str, tokens: str, make_model: Callable[..., PreTrainedModel]
) -> None:
    model = make_model(family)
    with distilling(model, objective, blend, tokens) as distillation:
        paper = PaperShape(
            distillation.gated_model,
            distillation.objective,
            tokens,
            distillation.blend,
        )
        for batch in (
            batch_of(random_sample(50, 1)),
            batch_of(random_sample(40, 1), random_sample(61, 2), side="left"),
        ):
            expected = step(distillation, batch)
            for settings in (StepSettings(), StepSettings(memory="least")):
                with prepared_step(paper, settings):
                    torch.testing.assert_close(step(paper, batch), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("blend", BLENDS)
@pytest.mark.parametrize("share", [1.1, 1.5, 2.5])
def test_the_fast_step_is_the_simple_step_within_any_budget(
    blend: str, share: float, make_model: Callable[..., PreTrainedModel]
) -> None:
    """Budgets between the memory of `least` and that of keeping everything."""
    model, batch = make_model("llama", max_position_embeddings=1024), batch_of(random_sample(700, 1))
    with distilling(model, "hidden_l2", blend) as distillation:
        expected = step(distillation, batch)
        with prepared_step(distillation, StepSettings(memory="1GiB")) as apply_plan:
            everything = apply_plan(700)
        assert everything is not None
        assert set(everything.levels) == {Keep.ALL}
        for too_little in ("0MiB", "0.1MiB"):
            with (
                pytest.raises(UserError, match="a step of 700 tokens needs at least"),
                prepared_step(distillation, StepSettings(memory=too_little)) as apply_plan,
            ):
                apply_plan(700)
        fixed = everything.weights + everything.buffers
        budget = f"{(fixed + everything.activations * (share - 1) / share) / 2**20:.4f}MiB"
        with prepared_step(distillation, StepSettings(memory=budget)) as apply_plan:
            try:
                plan = apply_plan(700)
            except UserError:
                assert share < 1.5
                return
            assert plan is not None
            assert set(plan.levels) != {Keep.ALL}
            torch.testing.assert_close(step(distillation, batch), expected, rtol=1e-5, atol=1e-8)


def test_least_needs_no_plan_whatever_the_budget(
    make_model: Callable[..., PreTrainedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Simulates a GPU, whose memory is limited."""
    monkeypatch.setattr(prepare, "available", lambda memory, device: 2**30)
    with distilling(make_model("llama"), "hidden_l2") as distillation:
        for memory, planned in (("auto", True), ("least", False)):
            with prepared_step(distillation, StepSettings(memory=memory)) as apply_plan:
                assert (apply_plan(40) is not None) == planned


def test_compiled_blends_are_the_same(make_model: Callable[..., PreTrainedModel]) -> None:
    from duo_id.attention.functions import _blend

    full, streaming = torch.randn(2, 1, 4, 30, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    gate = torch.tensor([0.1, 0.5, 0.9, 1.0])[:, None, None].requires_grad_()
    out = torch.compile(_blend, dynamic=True, backend="aot_eager")(gate, full, streaming)
    expected = _blend(gate, full, streaming)
    torch.testing.assert_close(out, expected)
    assert out.dtype == torch.bfloat16
    gradient, expected_gradient = (torch.autograd.grad(x.float().square().sum(), gate) for x in (out, expected))
    torch.testing.assert_close(gradient, expected_gradient)
    with pytest.raises(AssertionError, match="never rounded"):
        _blend(gate.bfloat16(), full, streaming)


def test_gates_train_in_the_published_shape(gate_training: Callable[..., Any]) -> None:
    method = GateSettings(name="duo", sink_size=2, recent_size=8)
    losses = []
    for settings in (StepSettings(), StepSettings(shape="paper", memory="least")):
        with gate_training(method, settings) as training:
            assert isinstance(training.distillation, PaperShape) == (settings.shape == "paper")
            training.gates.weight.data.fill_(0.4)
            losses.append(training.distillation.loss(training.gates.alpha(), batch_of(random_sample(40, 1))))
    torch.testing.assert_close(losses[0], losses[1])


def test_settings_that_make_no_sense_are_refused() -> None:
    with pytest.raises(UserError, match=r"step.shape=paper needs step.memory=least, not auto: step=paper_shape"):
        StepSettings(shape="paper")
    with pytest.raises(UserError, match=r"step.shape=slow: choose one of fast, paper"):
        StepSettings(shape="slow")
    with pytest.raises(UserError, match=r"step.memory=lots: choose"):
        StepSettings(memory="lots")
