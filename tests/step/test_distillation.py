"""The distance from full attention, against plain forwards with dense masks."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from duo_id.attention.blends import BLENDS
from duo_id.attention.functions import Backends
from duo_id.attention.interface import attached, bound_functions
from duo_id.attention.layers import BOUND
from duo_id.attention.window import Window
from duo_id.common.errors import UserError
from duo_id.data.samples import Sample, collate, with_scored
from duo_id.models.gated_model import GatedModel
from duo_id.models.language_model import LanguageModel
from duo_id.models.loading import byte_tokenizer
from duo_id.step.distillation import Distillation
from duo_id.step.objectives import OBJECTIVES, Objective, Outputs, make_objective
from duo_id.step.recompute import activation_checkpointing
from tests.support.dense import dense_attention, plain_outputs, slow_objective
from tests.support.planted import random_sample
from tests.support.tiny import compute_all_logits, hooks_of

WINDOW = Window(2, 8)
HYBRID: dict[str, Any] = {
    "head_dim": 16,
    "sliding_window": 9,
    "num_hidden_layers": 4,
    "layer_types": ["full_attention", "sliding_attention", "full_attention", "sliding_attention"],
}
MODELS: list[tuple[str, dict[str, Any]]] = [("llama", {}), ("gpt_neox", {}), ("gemma3_text", HYBRID)]
MakeModel = Callable[..., PreTrainedModel]


@contextmanager
def distilling(
    model: PreTrainedModel,
    objective: str | dict[str, float] = "hidden_l2",
    blend: str = "student",
    tokens: str = "labelled",
) -> Iterator[Distillation]:
    wrapped = LanguageModel(model, byte_tokenizer(), "tiny", "tiny", None, "random")
    with attached(model, Backends()) as layers:
        chosen = make_objective(objective)
        yield Distillation(GatedModel(wrapped, layers, WINDOW, Backends()), chosen, tokens, BLENDS[blend])


def with_logits(distillation: Distillation, outputs: Outputs) -> Outputs:
    """The outputs with the logits of all scored tokens, if these can be predicted."""
    if outputs.predicting is None:
        return outputs
    return replace(outputs, logits=distillation.gated_model.model.logits(outputs.predicting))


def batch_of(*samples: Sample, side: str = "right") -> dict[str, Any]:
    return with_scored(collate(list(samples), 0, side))


def gates_of(layers: int, kv_heads: int) -> Tensor:
    return torch.linspace(0.05, 0.95, layers * kv_heads).flip(0).view(layers, kv_heads)


def slow_loss(model: PreTrainedModel, sample: Sample, alpha: dict[int, Tensor], objective: str, blend: str) -> Tensor:
    indices = list(alpha)
    with dense_attention(model) as full:
        teacher = plain_outputs(model, sample, indices)
    with dense_attention(model, WINDOW.sink_size, WINDOW.recent_size, alpha, blend, dict(full.outputs)):
        student = plain_outputs(model, sample, indices)
    return slow_objective(objective, student, teacher).mean()


@pytest.mark.parametrize(("family", "changes"), MODELS, ids=[name for name, _ in MODELS])
@pytest.mark.parametrize("blend", BLENDS)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_loss_and_gradient_equal_a_slow_computation(
    family: str, changes: dict[str, Any], blend: str, objective: str, make_model: MakeModel
) -> None:
    model, sample = make_model(family, **changes), random_sample(40, 1, 7)
    with distilling(model, objective, blend) as distillation:
        layers = distillation.gated_model.layers
        indices = [layer.index for layer in layers]
        alpha = gates_of(len(layers), layers[0].kv_heads).requires_grad_()
        loss = distillation.loss(alpha, batch_of(sample))
        (gradient,) = torch.autograd.grad(loss, alpha)
        repeated_loss = distillation.loss(alpha, batch_of(sample), distillation.teacher(batch_of(sample)))
    assert torch.equal(loss, repeated_loss)
    expected = slow_loss(model, sample, dict(zip(indices, alpha, strict=True)), objective, blend)
    (slow_gradient,) = torch.autograd.grad(expected, alpha)
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(gradient, slow_gradient, rtol=1e-3, atol=1e-5)
    assert gradient.abs().max() > 1e-4


def test_layers_with_several_states_a_token_have_no_layer_l2(make_model: MakeModel) -> None:
    changes = {
        "vocab_size_per_layer_input": 260, "hidden_size_per_layer_input": 8, "layer_types": ["full_attention"] * 3,
        "num_kv_shared_layers": 0, "laurel_rank": 4, "altup_num_inputs": 2, "activation_sparsity_pattern": [0.0] * 3,
    }  # fmt: skip
    batch = batch_of(random_sample(40, 1))
    with (
        distilling(make_model("gemma3n_text", **changes), "layer_l2") as distillation,
        pytest.raises(UserError, match=r"^method\.objective: layers .* shape \(2, 1, 40, 32\)"),
    ):
        distillation.loss(gates_of(3, 2), batch)


def test_models_that_always_compute_all_logits_give_the_same_loss(make_model: MakeModel, monkeypatch: Any) -> None:
    model, batch = make_model("llama"), batch_of(random_sample(40, 1), random_sample(40, 2))
    with distilling(model, "kl") as distillation:
        alpha = gates_of(3, 2)
        expected = distillation.loss(alpha, batch)
        compute_all_logits(model, monkeypatch)
        torch.testing.assert_close(distillation.loss(alpha, batch), expected)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_padded_batch_is_the_mean_of_its_samples(side: str, objective: str, make_model: MakeModel) -> None:
    samples = [random_sample(40, 1), random_sample(61, 2)]
    with distilling(make_model("llama"), objective) as distillation:
        alpha = gates_of(3, 2)
        together = distillation.loss(alpha, batch_of(*samples, side=side))
        alone = [distillation.loss(alpha, batch_of(sample)) for sample in samples]
    torch.testing.assert_close(together, (alone[0] + alone[1]) / 2, rtol=1e-4, atol=1e-6)
    assert abs(alone[0] - alone[1]) > 1e-3 * abs(alone[0]), "the samples must differ for the test to mean anything"


@pytest.mark.parametrize("blend", BLENDS)
def test_a_padded_batch_with_other_blends(blend: str, make_model: MakeModel) -> None:
    samples = [random_sample(40, 1), random_sample(61, 2)]
    with distilling(make_model("llama"), "kl", blend) as distillation:
        together = distillation.loss(gates_of(3, 2), batch_of(*samples, side="left"))
        alone = [distillation.loss(gates_of(3, 2), batch_of(sample)) for sample in samples]
    torch.testing.assert_close(together, (alone[0] + alone[1]) / 2, rtol=1e-4, atol=1e-6)


def test_every_token_of_a_batch_counts_the_same_however_many_a_sample_has(make_model: MakeModel) -> None:
    samples = [random_sample(40, 1, 2), random_sample(40, 2, 6)]
    with distilling(make_model("llama"), "kl") as distillation:
        together = distillation.loss(gates_of(3, 2), batch_of(*samples))
        alone = [distillation.loss(gates_of(3, 2), batch_of(sample)) for sample in samples]
    torch.testing.assert_close(together, (2 * alone[0] + 6 * alone[1]) / 8, rtol=1e-4, atol=1e-6)


def slow_far_weights(model: PreTrainedModel, sample: Sample) -> Tensor:
    """From two plain forwards: full, and all heads streaming."""
    layers, kv_heads = model.config.num_hidden_layers, model.config.num_key_value_heads
    with dense_attention(model):
        full = plain_outputs(model, sample, [])
    closed = {layer: torch.zeros(kv_heads) for layer in range(layers)}
    with dense_attention(model, WINDOW.sink_size, WINDOW.recent_size, closed):
        near = plain_outputs(model, sample, [])
    return (slow_objective("next_token", near, full) - slow_objective("next_token", full, full)).clamp(min=0)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_far_tokens_count_by_what_they_gain_from_seeing_far(objective: str, make_model: MakeModel) -> None:
    model, sample = make_model("llama"), random_sample(60, 3, 30)
    gain = slow_far_weights(model, sample)
    assert 5 < (gain == 0).sum() < 25, "some of both kinds"
    with distilling(model, objective, tokens="far") as distillation:
        teacher = distillation.teacher(batch_of(sample))
        torch.testing.assert_close(teacher.weights, gain / gain.sum(), rtol=1e-3, atol=1e-5)
        assert teacher.weights.sum().item() == pytest.approx(1)
        assert teacher.outputs is not None
        student = distillation.student(gates_of(3, 2), batch_of(sample), teacher)
        values = OBJECTIVES[objective](*(with_logits(distillation, part) for part in (student, teacher.outputs)))
        loss = distillation.loss(gates_of(3, 2), batch_of(sample))
    torch.testing.assert_close(loss, (values * gain / gain.sum()).sum(), rtol=1e-3, atol=1e-5)


def test_far_weights_of_a_batch_are_shared_out_over_all_its_tokens(make_model: MakeModel) -> None:
    model, samples = make_model("llama"), [random_sample(60, 3, 20), random_sample(45, 4, 20)]
    gains = torch.cat([slow_far_weights(model, sample) for sample in samples])
    with distilling(model, tokens="far") as distillation:
        for side in ("left", "right"):
            weights = distillation.teacher(batch_of(*samples, side=side)).weights
            torch.testing.assert_close(weights, gains / gains.sum(), rtol=1e-3, atol=1e-5)


def test_padding_of_the_scored_tokens_has_no_weight(make_model: MakeModel) -> None:
    """Even where it would gain, as in some of these samples."""
    with distilling(make_model("llama"), tokens="far") as distillation:
        for seed in range(8):
            sample = random_sample(60, seed, 20)
            expected = distillation.teacher(batch_of(sample)).weights
            weights = distillation.teacher(with_scored(collate([sample], 0, "right"), 64)).weights
            assert len(weights) == 64
            torch.testing.assert_close(weights[:20], expected)
            assert not weights[20:].any()


def test_tokens_within_the_window_gain_nothing(make_model: MakeModel) -> None:
    with distilling(make_model("llama"), tokens="far") as distillation:
        teacher = distillation.teacher(batch_of(random_sample(8, 1, 3)))
        assert teacher.weights.tolist() == [0, 0, 0]
        assert distillation.loss(gates_of(3, 2), batch_of(random_sample(8, 1, 3))).item() == 0


def forwards_of(model: PreTrainedModel, run: Callable[[], Any]) -> int:
    """How often the layers run: logits run the model again, with the states in their place."""
    count = [0]
    layers: Any = model.base_model.layers
    hook = layers[0].register_forward_hook(lambda *_: count.__setitem__(0, count[0] + 1))
    run()
    hook.remove()
    return count[0]


@pytest.mark.parametrize(
    ("objective", "blend", "tokens", "forwards"),
    [
        ("kl", "student", "labelled", 2),
        ("next_token", "student", "labelled", 1),
        ("next_token", "detached", "labelled", 1),
        ("next_token", "teacher", "labelled", 2),
        ("next_token", "student", "far", 3),
        ("hidden_l2", "student", "far", 3),
    ],
)
def test_the_teacher_is_run_only_if_needed(
    objective: str, blend: str, tokens: str, forwards: int, make_model: MakeModel
) -> None:
    model, batch = make_model("llama"), batch_of(random_sample(40, 1))
    with distilling(model, objective, blend, tokens) as distillation:
        teacher = distillation.teacher(batch)
        assert (teacher.outputs is None) == (forwards == 1)
        assert set(teacher.attention) == ({0, 1, 2} if blend == "teacher" else set())
        assert forwards_of(model, lambda: distillation.loss(gates_of(3, 2), batch)) == forwards


def test_the_teacher_has_no_gradient_and_open_gates_no_loss(make_model: MakeModel) -> None:
    for blend in BLENDS:
        with distilling(make_model("llama"), "layer_l2", blend) as distillation:
            alpha = torch.ones(3, 2, requires_grad=True)
            batch = batch_of(random_sample(40, 1))
            teacher = distillation.teacher(batch)
            assert teacher.outputs is not None
            assert not teacher.outputs.hidden.requires_grad
            assert all(not states.requires_grad for states in teacher.outputs.layers)
            loss = distillation.loss(alpha, batch, teacher)
            assert loss.item() == 0
            assert loss.requires_grad


def test_only_what_is_needed_is_kept(make_model: MakeModel) -> None:
    batch = batch_of(random_sample(40, 1))
    for objective in OBJECTIVES:
        with distilling(make_model("llama"), objective) as distillation:
            outputs = distillation.outputs(batch)
            assert outputs.logits is None, "a chunk's are computed when the chunk is"
            assert (outputs.predicting is not None) == OBJECTIVES[objective].logits
            assert len(outputs.layers) == (3 if OBJECTIVES[objective].layers else 0)
            assert all(states.shape == (5, 32) for states in outputs.states)
            assert outputs.targets is not None
            assert torch.equal(outputs.targets, batch["input_ids"][0, -5:])


@pytest.mark.parametrize("objective", ["layer_l2", "kl"])
@pytest.mark.parametrize("blend", BLENDS)
def test_recomputation_changes_no_objective(objective: str, blend: str, make_model: MakeModel) -> None:
    model, batch, alpha = make_model("llama"), batch_of(random_sample(40, 1)), gates_of(3, 2).requires_grad_()
    with distilling(model, objective, blend) as distillation:
        loss = distillation.loss(alpha, batch)
        expected = (loss, *torch.autograd.grad(loss, alpha))
        with activation_checkpointing(model, distillation.gated_model.layers):
            loss = distillation.loss(alpha, batch)
            recomputed = (loss, *torch.autograd.grad(loss, alpha))
    torch.testing.assert_close(recomputed, expected)


@pytest.mark.parametrize("where", ["attention", "block", "head", "objective"])
@pytest.mark.parametrize("blend", ["student", "teacher"])
def test_nothing_stays_hooked_or_bound_after_an_exception(where: str, blend: str, make_model: MakeModel) -> None:
    model, batch = make_model("llama"), batch_of(random_sample(40, 1))

    def fails(*_: Any) -> Any:
        raise RuntimeError("on purpose")

    with distilling(model, {"layer_l2": 1, "kl": 1}, blend) as distillation:
        functions, hooks = bound_functions(distillation.gated_model.layers), hooks_of(model)
        teacher = distillation.teacher(batch)
        block = model.model.layers[1]
        spoiled = []
        if where == "objective":
            distillation.chunked = distillation.in_chunks(Objective(fails, layers=True, logits=True))
        else:
            module = {"attention": block.self_attn, "block": block, "head": model.lm_head}[where]
            spoiled.append(module.register_forward_pre_hook(fails))
        with pytest.raises(RuntimeError, match="on purpose"):
            distillation.loss(gates_of(3, 2).requires_grad_(), batch, teacher)
        if where in ("attention", "block"):  # the others have no part in the teacher's pass
            with pytest.raises(RuntimeError, match="on purpose"):
                distillation.teacher(batch)
        for hook in spoiled:
            hook.remove()
        assert bound_functions(distillation.gated_model.layers) == functions
        assert hooks_of(model) == hooks
        assert "forward" not in model.model.__dict__
    assert not hooks_of(model)
    assert not any(hasattr(module, BOUND) for module in model.modules())


# LayerNorm models: RMSNorm computes in float32 even in a float64 model, too coarse for finite differences.
@pytest.mark.parametrize("family", ["stablelm", "gpt_neox"])
@pytest.mark.parametrize("objective", ["kl", "next_token"])
@pytest.mark.parametrize("tokens", ["labelled", "far"])
def test_gate_gradients_equal_finite_differences(
    family: str, objective: str, tokens: str, make_model: MakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, batch = make_model(family).double(), batch_of(random_sample(40, 1, 12))
    monkeypatch.setattr(Tensor, "float", lambda self: self)  # objectives would round to float32
    with distilling(model, objective, tokens=tokens) as distillation:
        teacher = distillation.teacher(batch)
        alpha = gates_of(3, distillation.gated_model.layers[0].kv_heads).double().requires_grad_()
        loss = distillation.loss(alpha, batch, teacher)
        assert loss.dtype == torch.float64
        (gradient,) = torch.autograd.grad(loss, alpha)
        expected = torch.zeros_like(gradient)
        with torch.no_grad():
            for index in range(alpha.numel()):
                step = torch.zeros(alpha.numel(), dtype=torch.float64)
                step[index] = 1e-5
                above, below = (
                    distillation.loss(alpha + sign * step.view_as(alpha), batch, teacher) for sign in (1, -1)
                )
                expected.view(-1)[index] = (above - below) / 2e-5
    torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-7)
    assert expected.abs().min() > 1e-6


def test_outputs_of_an_ungated_model_are_those_of_plain_forwards(make_model: MakeModel) -> None:
    """Token by token, with either padding."""
    model, samples = make_model("llama"), [random_sample(40, 1), random_sample(61, 2)]
    expected = [plain_outputs(model, sample, [0, 1, 2]) for sample in samples]
    with distilling(model, "layer_l2", tokens="far") as distillation:
        for side in ("left", "right"):
            batched = with_logits(distillation, distillation.outputs(batch_of(*samples, side=side)))
            for name in ("hidden", "logits", "targets"):
                joined = torch.cat([getattr(single, name) for single in expected])
                torch.testing.assert_close(getattr(batched, name), joined, rtol=1e-4, atol=1e-5)
            for layer in range(3):
                joined = torch.cat([single.layers[layer] for single in expected])
                torch.testing.assert_close(batched.layers[layer], joined, rtol=1e-4, atol=1e-5)
