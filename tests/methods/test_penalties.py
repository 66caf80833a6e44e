"""Penalties by hand, and a target that is reached."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch

from duo_id.methods.penalties import L1, PENALTIES, Binary, TargetSparsity
from duo_id.methods.settings import GateSettings
from duo_id.train.gate_training import GateTraining

ADAMW = {"_target_": "torch.optim.AdamW", "lr": 0.05, "weight_decay": 0.0}
MakeTraining = Callable[..., AbstractContextManager[GateTraining]]


def test_l1_is_the_mean_and_pushes_every_gate_alike() -> None:
    openness = torch.tensor([[1.0, 0.5], [0.25, 0.25]], requires_grad=True)
    value = L1()(openness, 0.5)
    (gradient,) = torch.autograd.grad(value, openness)
    assert value.item() == 0.5
    assert gradient.tolist() == [[0.25, 0.25], [0.25, 0.25]]
    assert L1()(torch.tensor([[-1.0, 1.0]]), 0.0).item() == 1.0


def test_binary_is_1_half_way_and_0_at_the_ends() -> None:
    openness = torch.tensor([[0.0, 1.0], [0.5, 0.25]], requires_grad=True)
    value = Binary()(openness, 0.5)
    (gradient,) = torch.autograd.grad(value, openness)
    assert value.item() == (0 + 0 + 1 + 0.75) / 4
    assert gradient.tolist() == [[1.0, -1.0], [0.0, 0.5]]  # descent goes to the nearer end
    assert Binary()(torch.full((3, 2), 0.5), 0.0).item() == 1.0


def test_target_by_hand() -> None:
    penalty = TargetSparsity(0.8, 0.5)
    openness = torch.tensor([[0.9, 0.5]])  # sparsity 0.3
    assert penalty(openness, 1.0).item() == 0, "the multipliers start at 0"
    penalty.multipliers.data = torch.tensor([2.0, 10.0])
    for progress, target in ((0.0, 0.0), (0.25, 0.4), (0.5, 0.8), (0.9, 0.8), (1.0, 0.8)):
        missing = target - 0.3
        assert penalty(openness, progress).item() == pytest.approx(2 * missing + 10 * missing**2, abs=1e-6)
    at_once = TargetSparsity(0.8, 0.0)
    at_once.multipliers.data = torch.tensor([1.0, 0.0])
    assert at_once(openness, 0.0).item() == pytest.approx(0.5)


@pytest.mark.parametrize(("openness", "sign"), [(0.9, 1), (0.1, -1)])
def test_the_targets_gradients_point_at_it(openness: float, sign: int) -> None:
    """Too little sparsity: the multiplier, which is maximised, rises, and then gates are pushed to close."""
    penalty = TargetSparsity(0.5, 0.0)
    gates = torch.full((2, 3), openness, requires_grad=True)
    (gradient,) = torch.autograd.grad(penalty(gates, 1.0), penalty.multipliers)
    assert gradient[0] * sign > 0
    assert gradient[1] > 0, "of the square: it rises on either side"
    with torch.no_grad():
        penalty.multipliers.add_(0.1 * gradient)
    (gradient,) = torch.autograd.grad(penalty(gates, 1.0), gates)
    assert (gradient * sign > 0).all()


def test_all_penalties_are_modules_by_name() -> None:
    assert {"l1": L1, "binary": Binary, "target": TargetSparsity} == PENALTIES
    assert not list(L1().parameters())
    assert [name for name, _ in TargetSparsity(0.5, 0.5).named_parameters()] == ["multipliers"]


@pytest.mark.parametrize(
    ("gate", "target"),
    [("clamp", 0.5), ("sigmoid", 0.5), ("hard_concrete", 0.5), ("hard_concrete", 0.25), ("sigmoid", 0.75)],
)
def test_a_toy_problem_reaches_the_sparsity_it_is_asked_for(
    gate: str, target: float, gate_training: MakeTraining, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Heads are worth between nearly nothing and much; the optimizers are the ones that training makes."""
    settings: dict[str, Any] = {"sink_size": 2, "recent_size": 8, "gate": gate, "penalty": "target"}
    settings |= {"target_sparsity": target, "reg_weight": 1.0, "lr": 0.05, "optimizer": ADAMW}
    with gate_training(GateSettings(name="duo", **settings, initial=0.9)) as training:
        steps = 600
        training.steps = steps
        monkeypatch.setattr(GateTraining, "global_step", property(lambda self: self.done))
        configured: Any = training.configure_optimizers()
        optimizer, scheduler = configured["optimizer"], configured["lr_scheduler"]["scheduler"]
        worth = torch.linspace(0.01, 0.3, 6).view(3, 2)
        for done in range(steps):
            training.done = done  # type: ignore[assignment]
            benefit = (worth * (1 - training.gates.openness())).sum()
            loss = benefit + training.method.reg_weight * training.penalty(training.gates.openness())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            training.gates.project_()
            scheduler.step()
        sparsity_reached = 1 - training.gates.openness().mean().item()
        ranked = training.gates.openness().flatten()
    assert sparsity_reached == pytest.approx(target, abs=0.02)
    assert (ranked.diff() >= -0.02).all(), "what is worth more stays open"


def test_weights_of_several_penalties_add_up(gate_training: MakeTraining, monkeypatch: pytest.MonkeyPatch) -> None:
    penalty = {"l1": 2.0, "binary": 0.5, "target": 3.0}
    settings: dict[str, Any] = {"sink_size": 2, "recent_size": 8, "penalty": penalty, "target_sparsity": 0.5}
    with gate_training(GateSettings(name="duo", **settings, target_rise=1.0, optimizer=ADAMW)) as training:
        monkeypatch.setattr(GateTraining, "global_step", 5)  # of 10
        target = training.penalties["target"]
        assert isinstance(target, TargetSparsity)
        target.multipliers.data = torch.tensor([1.0, 0.0])
        openness = torch.full((3, 2), 0.9)
        expected = 2 * 0.9 + 0.5 * 0.36 + 3 * (0.25 - 0.1)
        assert training.penalty(openness).item() == pytest.approx(expected, abs=1e-6)
        optimizer: Any = training.configure_optimizers()
        gates, multipliers = optimizer["optimizer"].param_groups
        assert (gates.get("maximize"), multipliers["maximize"]) == (False, True)
        assert (multipliers["initial_lr"], multipliers["weight_decay"]) == (training.method.multiplier_lr, 0.0)
