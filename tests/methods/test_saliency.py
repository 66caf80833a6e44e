"""Saliency, against finite differences and against Fisher information worked out in full."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from duo_id.data.samples import batch_of_one
from duo_id.methods import saliency as module
from duo_id.methods.saliency import saliency
from duo_id.methods.settings import SaliencySettings
from duo_id.step import chunks
from duo_id.step.distillation import Distillation
from duo_id.step.objectives import OBJECTIVES, make_objective
from tests.methods.conftest import WINDOW, gated_model_of
from tests.support.dense import dense_attention, plain_outputs
from tests.support.planted import random_sample

MakeModel = Callable[..., PreTrainedModel]


def of(**changes: Any) -> SaliencySettings:
    return SaliencySettings("saliency", 3, 8, **changes)


@pytest.mark.parametrize("objective", [*OBJECTIVES, {"kl": 2.0, "layer_l2": 0.5}], ids=str)
def test_gradient_is_what_closing_each_gate_a_little_costs(
    objective: Any, make_model: MakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By central differences in float64, at one value and as the mean over several."""
    model, sample = make_model("gpt_neox").double(), random_sample(40, 1, 6)
    openness = [0.3, 0.8]
    with gated_model_of(model) as gated_model:
        averaged = saliency(gated_model, sample, of(objective=objective, at=openness))
        single = [saliency(gated_model, sample, of(objective=objective, at=[value])) for value in openness]
        monkeypatch.setattr(Tensor, "float", lambda self: self)  # objectives would round to float32
        distillation = Distillation(gated_model, make_objective(objective), "labelled")
        batch = batch_of_one(sample, gated_model.device)
        expected = []
        for value in openness:
            slopes = torch.zeros(gated_model.shape, dtype=torch.float64)
            for index in range(slopes.numel()):
                step = torch.zeros(slopes.numel(), dtype=torch.float64)
                step[index] = 1e-4
                with torch.no_grad():
                    closed, opened = (
                        distillation.loss((value + sign * step).view(gated_model.shape), batch) for sign in (-1, 1)
                    )
                slopes.view(-1)[index] = (closed - opened) / 2e-4
            expected.append(slopes)
        monkeypatch.undo()
    for scores, slopes in zip(single, expected, strict=True):
        torch.testing.assert_close(scores, slopes.float(), rtol=2e-3, atol=1e-5)
    torch.testing.assert_close(averaged, torch.stack(expected).mean(0).float(), rtol=2e-3, atol=1e-5)
    assert (averaged.dtype, averaged.requires_grad) == (torch.float32, False)


def slow_logits(model: PreTrainedModel, sample: Any, alpha: Tensor) -> Tensor:
    with dense_attention(model, WINDOW.sink_size, WINDOW.recent_size, dict(enumerate(alpha))):
        logits = plain_outputs(model, sample, []).logits
    assert logits is not None
    return logits


@pytest.mark.parametrize("at", [1.0, 0.4])
def test_fisher_is_the_expectation_over_all_labels(
    at: float, make_model: MakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a vocabulary of 7 every label's gradient is worked out; many draws approach the mean of their squares.

    That is the Gauss-Newton matrix too, the curvature of the KL divergence.
    """
    model, sample = make_model("llama", vocab_size=7, pad_token_id=0), random_sample(40, 1, 4)
    sample["input_ids"] %= 7
    alpha = torch.full((3, 2), at)
    jacobian = torch.autograd.functional.jacobian(lambda gates: slow_logits(model, sample, gates), alpha)
    chances = slow_logits(model, sample, alpha).softmax(-1)
    brute = torch.zeros(3, 2)
    gauss_newton = torch.zeros(3, 2)
    for token in range(4):
        slopes, chance = jacobian[token], chances[token]  # (7, 3, 2), (7,)
        mean = (chance[:, None, None] * slopes).sum(0)
        brute += sum(chance[label] * (slopes[label] - mean) ** 2 for label in range(7)) / 4
        curvature = torch.diag(chance) - torch.outer(chance, chance)
        gauss_newton += torch.einsum("vlh,vw,wlh->lh", slopes, curvature, slopes) / 4
    torch.testing.assert_close(brute, gauss_newton, rtol=1e-3, atol=1e-7)
    with gated_model_of(model) as gated_model:
        few = saliency(gated_model, sample, of(kind="fisher", at=[at]))
        assert torch.equal(few, saliency(gated_model, sample, of(kind="fisher", at=[at]))), "deterministic"
        monkeypatch.setattr(module, "DRAWS", 300)
        many = saliency(gated_model, sample, of(kind="fisher", at=[at]))
    torch.testing.assert_close(many, brute, rtol=0.25, atol=0)  # the error of squares is about sqrt(2 / 300)
    assert brute.max() > 3 * brute.min(), "the heads must differ for the test to mean anything"
    assert (few >= 0).all()


def test_fisher_takes_the_mean_over_at(make_model: MakeModel) -> None:
    sample = random_sample(40, 1, 4)
    with gated_model_of(make_model("llama")) as gated_model:
        parts = [saliency(gated_model, sample, of(kind="fisher", at=[value])) for value in (1.0, 0.5)]
        both = saliency(gated_model, sample, of(kind="fisher", at=[1.0, 0.5]))
    torch.testing.assert_close(both, (parts[0] + parts[1]) / 2)


def test_fisher_is_that_of_the_likelihood_whatever_the_objective(make_model: MakeModel) -> None:
    """And runs the layers once, without a teacher."""
    sample, forwards = random_sample(40, 1, 4), list[int]()
    with gated_model_of(make_model("llama")) as gated_model:
        blocks: Any = gated_model.model.model.base_model.layers
        blocks[0].register_forward_hook(lambda *_: forwards.append(1))
        scores = [saliency(gated_model, sample, of(kind="fisher", objective=name)) for name in OBJECTIVES]
    assert all(torch.equal(score, scores[0]) for score in scores)
    assert scores[0].max() > 0
    assert len(forwards) == len(OBJECTIVES)


def test_fisher_draws_the_same_labels_in_chunks_of_any_size(
    make_model: MakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    sample = random_sample(40, 1, 7)
    with gated_model_of(make_model("llama")) as gated_model:
        expected = saliency(gated_model, sample, of(kind="fisher"))
        for elements in (1, 3 * 96):
            monkeypatch.setattr(chunks, "ELEMENTS", elements)
            torch.testing.assert_close(saliency(gated_model, sample, of(kind="fisher")), expected)


def test_far_tokens_alone_can_be_asked_for(make_model: MakeModel) -> None:
    sample = random_sample(60, 3, 30)
    with gated_model_of(make_model("llama")) as gated_model:
        scores = {tokens: saliency(gated_model, sample, of(at=[0.5], tokens=tokens)) for tokens in ("labelled", "far")}
        alpha = torch.full((3, 2), 0.5, requires_grad=True)
        loss = Distillation(gated_model, OBJECTIVES["kl"], "far").loss(alpha, batch_of_one(sample, gated_model.device))
        torch.testing.assert_close(scores["far"], -torch.autograd.grad(loss, alpha)[0])
    assert (scores["far"] - scores["labelled"]).abs().max() > 1e-4
