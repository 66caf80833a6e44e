"""Training gates: the published objective and schedule, what stays frozen, and that the right head is found."""

from collections.abc import Callable, Iterable
from typing import Any

import lightning
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

from duo_id.attention.interface import bound
from duo_id.attention.window import Window
from duo_id.common.errors import UserError
from duo_id.data.samples import Batch, Sample, collate, pad_batch, with_scored
from duo_id.methods.settings import GateSettings
from duo_id.step.objectives import Objective, Outputs
from duo_id.step.settings import StepSettings
from duo_id.train.checkpoints import AtomicCheckpointIO, LastCheckpoint
from duo_id.train.gate_training import GateTraining, learning_rate_factor
from tests.support.planted import planted_model, planted_sample, random_sample

ADAMW = {"_target_": "torch.optim.AdamW", "lr": 0.05, "weight_decay": 0.0}
MakeTraining = Callable[..., Any]


def method(**changes: Any) -> GateSettings:
    return GateSettings(**{"name": "duo", "sink_size": 2, "recent_size": 8, "lr": 0.05, "optimizer": ADAMW} | changes)


def batch_of(*samples: Sample, side: str = "right") -> Batch:
    return collate(list(samples), 0, side)


def fit(training: GateTraining, batches: Iterable[Any], steps: int, folder: Any = None, **options: Any) -> Any:
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_steps=steps,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=folder is not None,
        callbacks=[LastCheckpoint(folder, 0.0)] if folder else [],
        plugins=[AtomicCheckpointIO()],
        default_root_dir=folder,
        log_every_n_steps=1,
        **options,
    )
    trainer.fit(training, DataLoader(list(batches), batch_size=None))
    return trainer


def test_learning_rate_rises_and_falls_over_a_fifth() -> None:
    factors = [learning_rate_factor(step, 100) for step in range(100)]
    assert factors[:4] == [0.1, 0.1, 0.15, 0.2]
    assert factors[19:82] == [1.0] * 62 + [19 / 20]
    assert factors[-3:] == [0.15, 0.1, 0.1]
    assert learning_rate_factor(0, 1) == 1.0  # too short to rise


def test_loss_is_the_published_objective(gate_training: MakeTraining) -> None:
    with gate_training(method(reg_weight=0.05)) as training:
        batch = with_scored(batch_of(random_sample(40, 1, scored=7)))
        alpha = torch.linspace(0, 1, 6).view(3, 2)
        training.gates.weight.data.copy_(alpha)
        model = training.language_model.model
        teacher = model.model(batch["input_ids"], use_cache=False).last_hidden_state
        full_scores = training.distillation.outputs(batch).hidden
        distill = training.distillation.loss(training.gates.alpha(), batch)
        assert torch.equal(full_scores, teacher[0, -7:])
        expected = []
        for token in range(33, 40):
            expected.append((student_hidden(training, batch)[0, token] - teacher[0, token]).square().mean())
        torch.testing.assert_close(distill, torch.stack(expected).mean())
        assert training.penalty(alpha).item() == pytest.approx(0.5)


def student_hidden(training: GateTraining, batch: dict[str, Any]) -> Tensor:
    from duo_id.attention.functions import gated_heads

    gated = {
        layer.index: gated_heads(
            row, Window(2, 8), training.distillation.blend, training.distillation.gated_model.backends
        )
        for layer, row in zip(training.gated_model.layers, training.gates.alpha(), strict=True)
    }
    with bound(training.gated_model.layers, gated):
        return training.language_model.hidden_states(batch)


@pytest.mark.parametrize("blend", ["student", "teacher"])
@pytest.mark.parametrize("memory", ["auto", "least"])
def test_only_gates_learn_and_they_stay_in_range(blend: str, memory: str, gate_training: MakeTraining) -> None:
    settings = method(blend=blend, reg_weight=2.0, initial=0.05)
    with gate_training(settings, StepSettings(memory=memory)) as training:
        model = training.language_model.model
        parameters_before = {name: parameter.clone() for name, parameter in model.named_parameters()}
        fit(training, [batch_of(random_sample(40, seed)) for seed in range(10)], 10)
        for name, parameter in model.named_parameters():
            assert parameter.grad is None, name
            assert not parameter.requires_grad, name
            assert torch.equal(parameter, parameters_before[name]), name
        assert not model.training
        assert training.gates.weight.dtype == torch.float32
        assert list(dict(training.named_parameters())) == ["gates.weight"]
        assert training.gates.weight.min() == 0, "without the projection the penalty pushes gates below 0"


@pytest.mark.parametrize("blend", ["student", "teacher"])
def test_recomputation_changes_nothing_and_runs_each_layer_once_more(blend: str, gate_training: MakeTraining) -> None:
    results, calls = {}, {}
    for memory in ("auto", "least"):
        with gate_training(method(blend=blend), StepSettings(memory=memory)) as training:
            training.gates.weight.data.copy_(torch.linspace(0.1, 0.9, 6).view(3, 2))
            count = [0]
            for layer in training.language_model.model.model.layers:
                layer.mlp.register_forward_pre_hook(lambda *unused, count=count: count.__setitem__(0, count[0] + 1))
            batch = with_scored(batch_of(random_sample(40, 1)))
            loss = training.distillation.loss(training.gates.alpha(), batch)
            loss.backward()
            results[memory], calls[memory] = training.gates.weight.grad, count[0]
    assert torch.equal(results["auto"], results["least"])
    assert results["least"].abs().max() > 0
    assert calls == {"auto": 6, "least": 9}  # three layers: teacher, student, and the student once more


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_batch_scores_each_token_as_alone(side: str, gate_training: MakeTraining) -> None:
    samples = [random_sample(40, 1), random_sample(61, 2)]
    with gate_training(method()) as training:
        training.gates.weight.data.copy_(torch.linspace(0.1, 0.9, 6).view(3, 2))
        alpha = training.gates.alpha()
        together = training.distillation.loss(alpha, with_scored(batch_of(*samples, side=side)))
        alone = [training.distillation.loss(alpha, with_scored(batch_of(sample))) for sample in samples]
        torch.testing.assert_close(together, (alone[0] + alone[1]) / 2)


def test_padding_to_few_lengths_changes_nothing(gate_training: MakeTraining) -> None:
    with gate_training(method()) as training:
        training.gates.weight.data.copy_(torch.linspace(0.1, 0.9, 6).view(3, 2))
        plain = with_scored(batch_of(random_sample(40, 1)))
        padded = with_scored(pad_batch(batch_of(random_sample(40, 1)), 64, 512), 32)
        assert padded["input_ids"].shape == (1, 64)
        assert len(padded["scored"]) == 32
        gradients = []
        for batch in (plain, padded):
            loss = training.distillation.loss(training.gates.alpha(), batch)
            gradients.append((loss.detach(), *torch.autograd.grad(loss, training.gates.weight)))
        torch.testing.assert_close(gradients[0], gradients[1])


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_checkpoint(
    gate_training: MakeTraining, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with gate_training(method()) as training:
        distillation = training.distillation

        def breaks(*outputs: Outputs) -> Tensor:
            return distillation.objective(*outputs) * (torch.nan if training.global_step == 3 else 1)

        monkeypatch.setattr(distillation, "chunked", distillation.in_chunks(Objective(breaks)))
        with pytest.raises(UserError, match=r"no longer finite at step 4.*method.lr.*last good checkpoint"):
            fit(training, [batch_of(random_sample(40, seed)) for seed in range(8)], 8, tmp_path)
    saved = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    assert saved["global_step"] == 3
    assert saved["state_dict"]["gates.weight"].isfinite().all()


def test_gates_that_are_not_finite_are_never_saved(gate_training: MakeTraining, tmp_path: Any) -> None:
    def spoil(grad: Tensor) -> Tensor:
        return grad * (torch.nan if training.global_step == 3 else 1)

    with gate_training(method()) as training:
        training.gates.weight.register_hook(spoil)  # the loss itself stays a number
        with pytest.raises(UserError, match="no longer finite"):
            fit(training, [batch_of(random_sample(40, seed)) for seed in range(4)], 4, tmp_path)
    saved = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    assert saved["state_dict"]["gates.weight"].isfinite().all()


def test_checkpoints_hold_gates_optimizer_and_position_alone(gate_training: MakeTraining, tmp_path: Any) -> None:
    with gate_training(method()) as training:
        fit(training, [batch_of(random_sample(40, seed)) for seed in range(3)], 3, tmp_path)
    saved = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    assert list(saved["state_dict"]) == ["gates.weight", "gates.mean", "gates.steps"]
    assert {key: saved["duo_id"][key] for key in ("model", "layers", "kv_heads")} == {
        "model": "tiny", "layers": 3, "kv_heads": 2
    }  # fmt: skip
    assert (tmp_path / "checkpoints" / "last.ckpt").stat().st_size < 20_000
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["last.ckpt"]


def test_a_checkpoint_of_another_model_is_refused(gate_training: MakeTraining, tmp_path: Any) -> None:
    with gate_training(method()) as training:
        fit(training, [batch_of(random_sample(40, seed)) for seed in range(3)], 3, tmp_path)
    with (
        gate_training(method(), num_hidden_layers=2) as other,
        pytest.raises(UserError, match=r"made with layers=3, this run has layers=2"),
    ):
        other.on_load_checkpoint(torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True))


def test_a_checkpoint_of_other_budgets_is_refused(gate_training: MakeTraining) -> None:
    checkpoint: dict[str, Any] = {}
    with gate_training(method(gate="nested", reg_weight=0.0, budgets=[0.4, 0.9])) as training:
        training.on_save_checkpoint(checkpoint)
        training.on_load_checkpoint(checkpoint)
    with (
        gate_training(method(gate="nested", reg_weight=0.0, budgets=[0.4, 0.97])) as other,
        pytest.raises(UserError, match=r"with method.budgets=\[0.4, 0.9\], .* method.budgets=\[0.4, 0.97\]; "),
    ):
        other.on_load_checkpoint(checkpoint)
    with (
        gate_training(method(gate="nested", reg_weight=0.0, budgets=[0.4, 0.9], temperature=0.5)) as other,
        pytest.raises(UserError, match=r"with method.temperature=1.0, this run has method.temperature=0.5; "),
    ):
        other.on_load_checkpoint(checkpoint)
    del checkpoint["duo_id"]["budgets"]  # as one of an earlier version
    with gate_training(method(gate="nested", reg_weight=0.0)) as later:
        later.on_load_checkpoint(checkpoint)


@pytest.mark.parametrize(
    ("changes", "shown"),
    [
        ({}, {"penalty", "mean_gate"}),
        ({"reg_weight": 0.0}, {"mean_gate"}),
        ({"gate": "nested", "reg_weight": 0.0}, set()),
    ],
)
def test_penalty_and_mean_gate_are_logged_where_they_mean_something(
    changes: dict[str, Any], shown: set[str], gate_training: MakeTraining
) -> None:
    with gate_training(method(**changes)) as training:
        trainer = fit(training, [batch_of(random_sample(40, 1))], 1)
        logged = {name.removeprefix("train/") for name in trainer.logged_metrics}
        assert logged & {"penalty", "mean_gate"} == shown
        assert {"loss", "distill", "length"} <= logged


def test_gates_are_made_as_the_method_says(gate_training: MakeTraining) -> None:
    settings = method(gate="nested", reg_weight=0.0, initial=0.3, temperature=0.7, budgets=[0.2, 0.6])
    with gate_training(settings) as training:
        gates = training.gates
        assert (gates.temperature, list(gates.budgets)) == (0.7, [0.2, 0.6])
        torch.testing.assert_close(gates.openness(), torch.full((3, 2), 0.3))
        opened = {int(gates.alpha().sum()) for _ in range(40)}
        assert opened == {2, 3, 4, 5}, "20 to 60% of six heads stream"


def test_gates_in_a_bfloat16_model_stay_float32(gate_training: MakeTraining) -> None:
    with gate_training(method(lr=1e-3, optimizer=ADAMW | {"lr": 1e-3})) as training:
        training.language_model.model.to(torch.bfloat16)
        fit(training, [batch_of(random_sample(40, seed)) for seed in range(4)], 4)
        assert training.gates.weight.dtype == torch.float32
        assert (training.gates.weight.bfloat16().float() != training.gates.weight).any(), "on bfloat16's coarse grid"


@pytest.mark.parametrize(
    ("layer", "kv_head", "settings", "margin"),
    [
        (2, 1, {"blend": "student"}, 0.3),
        (0, 1, {"blend": "teacher"}, 0.3),
        (1, 0, {"gate": "nested", "initial": 0.5, "reg_weight": 0}, 0.05),
    ],
    ids=["student", "teacher", "nested"],
)
def test_the_planted_head_is_ranked_first(
    layer: int,
    kv_head: int,
    settings: dict[str, Any],
    margin: float,
    gate_training: MakeTraining,
    make_model: Callable[..., PreTrainedModel],
) -> None:
    with gate_training(method(**settings)) as training:
        planted = planted_model(make_model, layer, kv_head)
        training.language_model.model.load_state_dict(planted.state_dict())
        training.language_model.model.model.rotary_emb = planted.model.rotary_emb
        training.steps = 40
        fit(training, [batch_of(planted_sample(seed)) for seed in range(40)], 40)
        scores = training.pattern().scores
    assert scores.argmax() == layer * 2 + kv_head
    others = scores.flatten()[torch.arange(6) != layer * 2 + kv_head]
    assert scores.max() - others.max() > margin, scores


def test_a_finished_run_holds_no_graphs(gate_training: MakeTraining, monkeypatch: pytest.MonkeyPatch) -> None:
    """They would occupy memory that the next seed of `repeats=` needs; on the CPU a stand-in replaces one."""
    with gate_training(method(), StepSettings(cuda_graphs=True)) as training:
        held: list[int] = []
        training.graphs._captured["shapes"] = "a graph"
        monkeypatch.setattr(training, "on_train_end", lambda: held.append(len(training.graphs._captured)))
        fit(training, [batch_of(random_sample(40, 1))], 1)
        assert held == [1]
        assert not training.graphs._captured
