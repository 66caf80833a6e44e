import pytest
import torch

from duo_id.objectives import OBJECTIVES, hidden_l2


def test_hidden_l2_by_hand() -> None:
    student = torch.tensor([[1.0, 2.0, 3.0, 4.0], [0.0, 0.0, 0.0, 0.0]])
    teacher = torch.tensor([[1.0, 0.0, 3.0, 0.0], [2.0, -2.0, 2.0, -2.0]])
    assert hidden_l2(student, teacher).tolist() == [(0 + 4 + 0 + 16) / 4, 4.0]


@pytest.mark.parametrize("name", OBJECTIVES)
def test_objectives_are_zero_for_equal_states_and_work_in_float32(name: str) -> None:
    states = torch.randn(5, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    same, other = OBJECTIVES[name](states, states), OBJECTIVES[name](states, states + 1)
    assert same.shape == (5,)
    assert same.dtype == torch.float32
    assert not same.any()
    assert (other > 0).all()


def test_hidden_l2_keeps_small_differences_beside_large_ones() -> None:
    student, teacher = torch.tensor([[256.0, 1.0, 1.0, 1.0]]).bfloat16(), torch.zeros(1, 4).bfloat16()
    assert hidden_l2(student, teacher).item() == (256**2 + 3) / 4  # bfloat16 would say 256 ** 2 / 4
