"""Objectives a chunk of tokens at a time, against all tokens at once with nothing of the package in between."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from duo_id.data.samples import batch_of_one
from duo_id.methods.candidates import MaskLosses
from duo_id.methods.saliency import saliency
from duo_id.methods.settings import SaliencySettings
from duo_id.models.gated_model import GatedModel
from duo_id.models.language_model import LanguageModel
from duo_id.models.loading import byte_tokenizer
from duo_id.step import chunks
from duo_id.step.chunks import ChunkedObjective
from duo_id.step.distillation import Distillation
from duo_id.step.objectives import OBJECTIVES, Objective, Outputs, make_objective
from tests.methods.conftest import gated_model_of
from tests.support.dense import slow_objective
from tests.support.planted import random_sample
from tests.support.tensors import LargestTensor, saved_for_backward
from tests.support.tiny import tiny_model

TOKENS, HIDDEN, LAYERS, VOCABULARY = 7, 32, 3, 96
HEADS: dict[str, dict[str, Any]] = {
    "llama": {},
    "gemma2": {"final_logit_softcapping": 2.0, "head_dim": 8},
    "granite": {"logits_scaling": 3.0},
}
MakeModel = Callable[..., PreTrainedModel]


def everything(student: Outputs, teacher: Outputs) -> Tensor:
    """Uses all that an objective may."""
    assert student.logits is not None
    assert teacher.logits is not None
    assert student.targets is not None
    targets = student.targets.expand(student.logits.shape[:-1])[..., None]
    by_layer = [(ours - theirs).abs().mean(-1) for ours, theirs in zip(student.layers, teacher.layers, strict=True)]
    wrong = (student.logits.float() - teacher.logits.float()).tanh().gather(-1, targets)[..., 0]
    return wrong * torch.stack(by_layer).sum(0) + (student.hidden * teacher.hidden).float().mean(-1)


EVERYTHING = Objective(everything, layers=True, logits=True)
MIXTURE = {"hidden_l2": 0.5, "layer_l2": 2.0, "next_token": 1.5}
CHOSEN: dict[str, Objective] = OBJECTIVES | {"mixture": make_objective(MIXTURE), "everything": EVERYTHING}


def language_model(family: str = "llama", **changes: Any) -> LanguageModel:
    model = tiny_model(family, **{"tie_word_embeddings": False} | HEADS[family] | changes)
    return LanguageModel(model, byte_tokenizer(), "tiny", "tiny", None, "random")


def chunked(objective: Objective, model: LanguageModel) -> ChunkedObjective:
    return ChunkedObjective(objective, model.logits, model.vocabulary)


def drawn(objective: Objective, seed: int, *leading: int, tokens: int = TOKENS) -> Outputs:
    """Random states, those that the objective needs."""
    generator = torch.Generator().manual_seed(seed)

    def states() -> Tensor:
        return torch.randn(*leading, tokens, HIDDEN, generator=generator)

    layers = tuple(states() for _ in range(LAYERS if objective.layers else 0))
    targets = torch.arange(tokens) * 5 % VOCABULARY
    return Outputs(states(), layers, None, targets, states() if objective.logits else None)


def with_gradient(outputs: Outputs) -> Outputs:
    return outputs.with_states([states.detach().clone().requires_grad_() for states in outputs.states])


def with_logits(outputs: Outputs, model: PreTrainedModel) -> Outputs:
    """All logits at once, from the head's weight and what the family does to its logits."""
    if outputs.predicting is None:
        return outputs
    logits = outputs.predicting @ model.lm_head.weight.T
    cap = getattr(model.config, "final_logit_softcapping", None)
    logits = cap * (logits / cap).tanh() if cap else logits / getattr(model.config, "logits_scaling", 1.0)
    return replace(outputs, logits=logits)


def slow_loss(name: str, student: Outputs, teacher: Outputs, weights: Tensor, model: PreTrainedModel) -> Tensor:
    """The weighted sum, candidate by candidate and token by token."""
    if student.hidden.dim() > 2:
        candidates = range(len(student.hidden))
        alone = [student.with_states([states[index] for states in student.states]) for index in candidates]
        return torch.stack([slow_loss(name, candidate, teacher, weights, model) for candidate in alone])
    student, teacher = with_logits(student, model), with_logits(teacher, model)
    if name == "everything":
        tokens = [slice(token, token + 1) for token in range(len(weights))]
        values = torch.cat([everything(student[token], teacher[token]) for token in tokens])
    elif name == "mixture":
        parts = [weight * slow_objective(part, student, teacher) for part, weight in MIXTURE.items()]
        values = torch.stack(parts).sum(0)
    else:
        values = slow_objective(name, student, teacher)
    return (values * weights).sum()


def set_chunk(monkeypatch: pytest.MonkeyPatch, objective: Objective, tokens: int, candidates: int = 1) -> None:
    """Let chunks have this many tokens."""
    widest = max(HIDDEN * (1 + (LAYERS if objective.layers else 0)), VOCABULARY if objective.logits else 0)
    monkeypatch.setattr(chunks, "ELEMENTS", tokens * candidates * widest)


FAMILIES_OF = [("llama", name) for name in CHOSEN] + [
    (family, name) for family in ("gemma2", "granite") for name in ("kl", "next_token", "mixture", "everything")
]


@pytest.mark.parametrize("leading", [(), (4,)], ids=["one", "candidates"])
@pytest.mark.parametrize(("family", "name"), FAMILIES_OF)
def test_value_and_gradient_equal_a_slow_computation(
    family: str, name: str, leading: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One token at a time, chunks that leave a rest, and more at once than there are."""
    objective, model = CHOSEN[name], language_model(family)
    student = with_gradient(drawn(objective, 1, *leading))
    teacher = drawn(objective, 2) if objective.teacher else student
    weights, outer = torch.linspace(0.2, 1.4, TOKENS), torch.linspace(-1, 2, 4) if leading else torch.tensor(1.5)
    expected = slow_loss(name, student, teacher, weights, model.model)
    slow_gradients = torch.autograd.grad((expected * outer).sum(), student.states, allow_unused=True)
    assert max(part.abs().max() for part in slow_gradients if part is not None) > 1e-3
    for tokens, count in ((1, 7), (3, 3), (100, 1)):
        set_chunk(monkeypatch, objective, tokens, len(outer) if leading else 1)
        computed = chunked(objective, model)
        assert len(list(computed.chunks(student))) == count
        loss = computed.loss(student, teacher, weights)
        assert (loss.shape, loss.dtype) == (leading, torch.float32)
        gradients = torch.autograd.grad((loss * outer).sum(), student.states, allow_unused=True)
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
        assert [part is None for part in gradients] == [part is None for part in slow_gradients]
        for gradient, slow_gradient in zip(gradients, slow_gradients, strict=True):
            torch.testing.assert_close(gradient, slow_gradient, rtol=1e-4, atol=1e-6)
        with torch.no_grad():
            torch.testing.assert_close(computed.loss(student, teacher, weights), expected, rtol=1e-5, atol=1e-5)
            values = computed.values(student, teacher)
            assert values.shape == (*leading, TOKENS)
            torch.testing.assert_close((values * weights).sum(-1), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", CHOSEN)
def test_bfloat16_states_have_a_float32_loss_and_bfloat16_gradients(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    objective, model = CHOSEN[name], language_model()
    model.model.bfloat16()
    student, teacher = (
        outputs.with_states([states.bfloat16() for states in outputs.states])
        for outputs in (drawn(objective, 1), drawn(objective, 2))
    )
    student, weights = with_gradient(student), torch.linspace(0.2, 1.4, TOKENS)
    teacher = teacher if objective.teacher else student
    values = objective(with_logits(student, model.model), with_logits(teacher, model.model))
    expected = (values * weights).sum()
    slow_gradients = torch.autograd.grad(expected, student.states, allow_unused=True)
    for tokens in (1, 3, 100):
        set_chunk(monkeypatch, objective, tokens)
        loss = chunked(objective, model).loss(student, teacher, weights)
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss, expected, rtol=1e-2, atol=1e-2)
        gradients = torch.autograd.grad(loss, student.states, allow_unused=True)
        for gradient, slow_gradient in zip(gradients, slow_gradients, strict=True):
            torch.testing.assert_close(gradient, slow_gradient, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("leading", [(), (4,)], ids=["one", "candidates"])
@pytest.mark.parametrize("name", CHOSEN)
def test_no_scored_token_at_all_is_no_loss(name: str, leading: tuple[int, ...]) -> None:
    """As in the part of a sample that a process has, while others have its answer."""
    objective, computed = CHOSEN[name], chunked(CHOSEN[name], language_model())
    student = with_gradient(drawn(objective, 1, *leading, tokens=0))
    teacher = drawn(objective, 2, tokens=0) if objective.teacher else student
    assert computed.values(student, teacher).shape == (*leading, 0)
    loss = computed.loss(student, teacher, torch.zeros(0))
    assert torch.equal(loss, torch.zeros(leading))
    gradients = torch.autograd.grad(loss.sum(), student.states, allow_unused=True)
    assert all(part is None or part.shape == (*leading, 0, HIDDEN) for part in gradients)
    assert any(part is not None for part in gradients)


@pytest.mark.parametrize(("name", "passes"), [("hidden_l2", 0), ("next_token", 1), ("kl", 2), ("everything", 2)])
def test_the_head_computes_each_token_once(name: str, passes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A student that has no teacher is not computed in its place."""
    objective, model, rows = CHOSEN[name], language_model(), list[int]()
    set_chunk(monkeypatch, objective, 3)
    model.model.lm_head.register_forward_hook(lambda module, args, output: rows.append(output.shape[1]))
    student = with_gradient(drawn(objective, 1))
    teacher = drawn(objective, 2) if objective.teacher else student
    loss = chunked(objective, model).loss(student, teacher, torch.ones(TOKENS))
    loss.backward()
    assert sorted(rows) == sorted([3, 3, 1] * passes)


WORDS, SCORED = 2000, 24  # so many that anything else is small


def wide_model() -> PreTrainedModel:
    return tiny_model("llama", vocab_size=WORDS, tie_word_embeddings=False)


def loss_and_gradient(objective: str, tokens: str = "labelled") -> Callable[[GatedModel], Any]:
    def run(gated_model: GatedModel) -> Any:
        alpha = torch.full(gated_model.shape, 0.5, requires_grad=True)
        distillation = Distillation(gated_model, make_objective({objective: 1.0, "layer_l2": 0.5}), tokens)
        batch = batch_of_one(random_sample(40, 1, SCORED), gated_model.device)
        loss = distillation.loss(alpha, batch)
        return loss, torch.autograd.grad(loss, alpha)[0]

    return run


def candidates(gated_model: GatedModel) -> Any:
    masks = torch.eye(6, dtype=torch.bool).view(6, *gated_model.shape)
    batch = batch_of_one(random_sample(40, 1, SCORED), gated_model.device)
    return MaskLosses(Distillation(gated_model, OBJECTIVES["kl"]), [batch], 10_000)(masks)


def fisher(gated_model: GatedModel) -> Any:
    return saliency(gated_model, random_sample(40, 1, SCORED), SaliencySettings("saliency", 3, 8, kind="fisher"))


@pytest.mark.parametrize(
    ("compute", "least"),
    [
        (loss_and_gradient("kl"), 1),
        (loss_and_gradient("next_token"), 1),
        (loss_and_gradient("kl_next_token", "far"), 1),
        (candidates, 6),
        (fisher, 1),
    ],
    ids=["kl", "next_token", "far", "candidates", "fisher"],
)
def test_no_tensor_is_larger_than_a_chunks_logits(
    compute: Callable[[GatedModel], Any], least: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In forward and backward pass; the result does not depend on chunks."""
    model = wide_model()
    with gated_model_of(model) as gated_model:
        largest, results = {}, {}
        for tokens in (5, SCORED):
            monkeypatch.setattr(chunks, "ELEMENTS", tokens * least * WORDS)
            with LargestTensor(model) as seen:
                results[tokens] = compute(gated_model)
            largest[tokens] = seen.elements
    assert largest == {tokens: tokens * least * WORDS for tokens in (5, SCORED)}
    torch.testing.assert_close(results[5], results[SCORED], rtol=1e-4, atol=1e-6)


def test_what_is_kept_for_the_backward_pass_does_not_grow_with_the_vocabulary() -> None:
    objective, saved, slowly_saved = CHOSEN["kl_next_token"], [], []
    for words in (VOCABULARY, 20 * VOCABULARY):
        model = language_model(vocab_size=words)
        student, teacher = with_gradient(drawn(objective, 1)), drawn(objective, 2)
        with saved_for_backward() as sizes:
            loss = chunked(objective, model).loss(student, teacher, torch.ones(TOKENS))
        saved.append(sizes)
        with saved_for_backward() as sizes:
            slow = objective(with_logits(student, model.model), with_logits(teacher, model.model)).sum()
        slowly_saved.append(sizes)
        torch.testing.assert_close(loss, slow)
    assert saved[0] == saved[1] == [TOKENS * HIDDEN], "the gradient of the states that logits are made of"
    assert sum(slowly_saved[1]) > 10 * sum(slowly_saved[0])
