import pytest
import torch

from duo_id.gates import GATES, PENALTIES, ClampedGates, l1


@pytest.mark.parametrize("name", GATES)
@pytest.mark.parametrize("initial", [0.0, 0.25, 1.0])
def test_gates_start_where_they_are_told_in_float32(name: str, initial: float) -> None:
    gates = GATES[name](3, 2, initial)
    alpha = gates.alpha()
    assert alpha.dtype == torch.float32
    assert alpha.requires_grad
    assert alpha.tolist() == [[initial] * 2] * 3


def test_projection_brings_gates_back_to_zero_and_one_and_leaves_the_others() -> None:
    gates = ClampedGates(2, 2)
    parameter = gates.weight
    parameter.data = torch.tensor([[-0.3, 1.2], [0.4, 0.999]])
    gates.project_()
    assert gates.weight is parameter, "the optimizer holds on to this parameter"
    assert torch.equal(gates.alpha(), torch.tensor([[0.0, 1.0], [0.4, 0.999]]))


def test_gates_at_the_edge_still_get_their_gradient() -> None:
    gates = ClampedGates(1, 3)
    gates.weight.data = torch.tensor([[0.0, 1.0, 0.5]])
    (gates.alpha() * torch.tensor([[2.0, 3.0, 4.0]])).sum().backward()
    assert gates.weight.grad.tolist() == [[2.0, 3.0, 4.0]]


def test_l1_is_the_mean_and_pushes_every_gate_alike() -> None:
    alpha = torch.tensor([[1.0, 0.5], [0.25, 0.25]], requires_grad=True)
    value = l1(alpha)
    value.backward()
    assert value.item() == 0.5
    assert alpha.grad.tolist() == [[0.25, 0.25], [0.25, 0.25]]
    assert l1(torch.tensor([[-1.0, 1.0]])).item() == 1.0


def test_every_penalty_is_least_for_closed_gates() -> None:
    for penalty in PENALTIES.values():
        assert penalty(torch.zeros(2, 2)) < penalty(torch.full((2, 2), 0.5)) < penalty(torch.ones(2, 2))
