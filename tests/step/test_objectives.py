"""The objectives against numbers worked out by hand and against torch's own losses."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from duo_id.common.errors import UserError
from duo_id.step.objectives import OBJECTIVES, Objective, Outputs, make_objective

N, HIDDEN, VOCABULARY, LAYERS = 5, 8, 11, 3


def outputs(seed: int, *leading: int, dtype: torch.dtype = torch.float32) -> Outputs:
    """Random outputs."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*leading, *shape, generator=generator).to(dtype)

    layers = tuple(drawn(N, HIDDEN) for _ in range(LAYERS))
    targets = torch.arange(N) * 2
    return Outputs(drawn(N, HIDDEN), layers, drawn(N, VOCABULARY), targets)


def of_hidden(*rows: list[float]) -> Outputs:
    return Outputs(torch.tensor(rows))


STUDENT = of_hidden([1.0, 2.0, 3.0, 4.0], [0.0, 0.0, 0.0, 0.0])
TEACHER = of_hidden([1.0, 0.0, 3.0, 0.0], [2.0, -2.0, 2.0, -2.0])


def test_hidden_l2_by_hand() -> None:
    assert OBJECTIVES["hidden_l2"](STUDENT, TEACHER).tolist() == [(0 + 4 + 0 + 16) / 4, 4.0]


def test_relative_l2_by_hand() -> None:
    assert OBJECTIVES["relative_l2"](STUDENT, TEACHER).tolist() == [(4 + 16) / (1 + 9), 1.0]
    nothing = of_hidden([0.0, 0.0], [0.0, 0.0])
    assert OBJECTIVES["relative_l2"](nothing, nothing).tolist() == [0, 0], "no division by zero"


def test_layer_l2_by_hand() -> None:
    far, nowhere = torch.full((2, 4), 9.0), torch.zeros(2, 4)
    student = Outputs(far, (STUDENT.hidden, TEACHER.hidden))
    teacher = Outputs(nowhere, (TEACHER.hidden, TEACHER.hidden))
    assert OBJECTIVES["layer_l2"](student, teacher).tolist() == [1.0, 0.5], "the last hidden states have no part in it"


def test_kl_by_hand() -> None:
    """Teacher (1/2, 1/4, 1/4), student uniform; the direction matters."""
    student = Outputs(torch.zeros(1, 1), logits=torch.full((1, 3), 7.0))
    teacher = Outputs(torch.zeros(1, 1), logits=torch.tensor([[2.0, 1.0, 1.0]]).log())
    expected = 0.5 * math.log(0.5 * 3) + 0.5 * math.log(0.25 * 3)
    assert OBJECTIVES["kl"](student, teacher).item() == pytest.approx(expected, abs=1e-6)
    back = (math.log(2 / 3) + 2 * math.log(4 / 3)) / 3
    assert OBJECTIVES["kl"](teacher, student).item() == pytest.approx(back, abs=1e-6)


def test_next_token_by_hand() -> None:
    logits = torch.tensor([[2.0, 1.0, 1.0], [1.0, 1.0, 6.0]]).log()
    student = Outputs(torch.zeros(2, 1), logits=logits, targets=torch.tensor([0, 1]))
    losses = OBJECTIVES["next_token"](student, Outputs(torch.zeros(0)))
    torch.testing.assert_close(losses, torch.tensor([math.log(2), math.log(8)]))


def test_distributions_against_torch() -> None:
    student, teacher = outputs(1), outputs(2)
    assert student.logits is not None
    assert teacher.logits is not None
    assert student.targets is not None
    student_log, teacher_log = student.logits.log_softmax(-1), teacher.logits.log_softmax(-1)
    expected = F.kl_div(student_log, teacher_log, reduction="none", log_target=True).sum(-1)
    torch.testing.assert_close(OBJECTIVES["kl"](student, teacher), expected)
    likelihood = F.cross_entropy(student.logits, student.targets, reduction="none")
    torch.testing.assert_close(OBJECTIVES["next_token"](student, teacher), likelihood)
    torch.testing.assert_close(OBJECTIVES["kl_next_token"](student, teacher), expected + 0.3 * likelihood)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_objectives_are_zero_for_equal_outputs_alone_and_work_in_float32(name: str) -> None:
    teacher, other = outputs(1, dtype=torch.bfloat16), outputs(2, dtype=torch.bfloat16)
    same, different = OBJECTIVES[name](teacher, teacher), OBJECTIVES[name](other, teacher)
    assert same.shape == different.shape == (N,)
    assert same.dtype == different.dtype == torch.float32
    assert not same.any() or "next_token" in name
    assert (different > 0).all()

    def upcast(halves: Outputs) -> Outputs:
        assert halves.logits is not None
        layers = tuple(layer.float() for layer in halves.layers)
        return Outputs(halves.hidden.float(), layers, halves.logits.float(), halves.targets)

    assert torch.equal(different, OBJECTIVES[name](upcast(other), upcast(teacher)))


def test_hidden_l2_keeps_small_differences_beside_large_ones() -> None:
    student = Outputs(torch.tensor([[256.0, 1.0, 1.0, 1.0]]).bfloat16())
    losses = OBJECTIVES["hidden_l2"](student, Outputs(torch.zeros(1, 4).bfloat16()))
    assert losses.item() == (256**2 + 3) / 4  # bfloat16 would say 256 ** 2 / 4


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("leading", [(4,), (2, 3), (1,), (N,)])
def test_candidates_are_compared_with_one_teacher(name: str, leading: tuple[int, ...]) -> None:
    student, teacher = outputs(1, *leading), outputs(2)
    losses = OBJECTIVES[name](student, teacher)
    assert losses.shape == (*leading, N)
    assert student.logits is not None
    for position in torch.cartesian_prod(*map(torch.arange, leading)).view(-1, len(leading)).tolist():
        at = tuple(position)
        layers = tuple(layer[at] for layer in student.layers)
        alone = Outputs(student.hidden[at], layers, student.logits[at], student.targets)
        torch.testing.assert_close(losses[at], OBJECTIVES[name](alone, teacher))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_objectives_say_what_they_need(name: str) -> None:
    objective, student, teacher = OBJECTIVES[name], outputs(1), outputs(2)
    spared: dict[str, Any] = {}
    if not objective.layers:
        spared["layers"] = ()
    if not objective.logits:
        spared["logits"] = None
    without = Outputs(torch.zeros(0)) if not objective.teacher else replace(teacher, **spared)
    assert torch.equal(objective(replace(student, **spared), without), objective(student, teacher))
    assert (objective.layers, objective.logits, objective.teacher) == {
        "layer_l2": (True, False, True),
        "kl": (False, True, True),
        "next_token": (False, True, False),
        "kl_next_token": (False, True, True),
    }.get(name, (False, False, True))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_gradients_flow_to_the_student(name: str) -> None:
    student, teacher = outputs(1), outputs(2)
    assert student.logits is not None
    parts = [student.hidden, *student.layers, student.logits]
    for part in parts:
        part.requires_grad_()
    gradients = torch.autograd.grad(OBJECTIVES[name](student, teacher).sum(), parts, allow_unused=True)
    assert any(gradient is not None and gradient.abs().max() > 0 for gradient in gradients)


def test_mixtures_are_weighted_sums_and_need_what_their_parts_need() -> None:
    student, teacher = outputs(1), outputs(2)
    mixture = make_objective({"hidden_l2": 0.5, "next_token": 2.0, "layer_l2": 1.0})
    parts = {name: OBJECTIVES[name](student, teacher) for name in OBJECTIVES}
    expected = 0.5 * parts["hidden_l2"] + 2 * parts["next_token"] + parts["layer_l2"]
    torch.testing.assert_close(mixture(student, teacher), expected)
    assert (mixture.layers, mixture.logits, mixture.teacher) == (True, True, True)
    lone = make_objective({"next_token": 3.0})
    torch.testing.assert_close(lone(student, teacher), 3 * parts["next_token"])
    assert (lone.layers, lone.logits, lone.teacher) == (False, True, False)
    several = make_objective({"kl": 1, "relative_l2": 1})
    candidates = outputs(3, 4)
    assert several(candidates, teacher).shape == (4, N)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_one_name_is_that_objective(name: str) -> None:
    for chosen in (name, {name: 1.0}):
        made = make_objective(chosen)
        assert made == OBJECTIVES[name]


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ("l3", r"method\.objective=l3: choose one of hidden_l2, .*, or weights"),
        ({"kl": 1.0, "mse": 1.0}, r"method\.objective=mse: choose one of"),
        ({"kl": 0.0}, r"method\.objective\.kl=0\.0 must be a positive weight"),
        ({"kl": 1.0, "hidden_l2": -1.0}, r"method\.objective\.hidden_l2=-1\.0 must be"),
        ({"kl": math.nan}, r"method\.objective\.kl=nan must be"),
        ({"kl": "much"}, r"method\.objective\.kl=much must be"),
        ({"kl": None}, r"method\.objective\.kl=None must be"),
        ({}, r"method\.objective=\{\}: choose one of"),
        (3, r"method\.objective=3: choose one of"),
        (None, r"method\.objective=None: choose one of"),
        (0.5, r"method\.objective=0\.5 cannot be imported"),
        ("nowhere.cosine", r"method\.objective=nowhere\.cosine cannot be imported from here: No module"),
        ("math.cosine", r"method\.objective=math\.cosine cannot be imported from here: .*has no attribute"),
        ("math.cos", r"method\.objective=math\.cos is a builtin_function_or_method, not .*Objective\(function\)"),
    ],
)
def test_refusals(chosen: Any, message: str) -> None:
    with pytest.raises(UserError, match=f"^{message}") as error:
        make_objective(chosen)
    assert "\n" not in str(error.value)


OWN = Objective(lambda student, teacher: 2 * (student.hidden - teacher.hidden).abs().mean(-1), layers=True)


def test_an_objective_of_ones_own_by_its_dotted_name() -> None:
    assert make_objective(f"{__name__}.OWN") == OWN
    student, teacher = outputs(1), outputs(2)
    mixture = make_objective({f"{__name__}.OWN": 0.5, "kl": 1.0})
    torch.testing.assert_close(
        mixture(student, teacher), 0.5 * OWN(student, teacher) + OBJECTIVES["kl"](student, teacher)
    )
    assert (mixture.layers, mixture.logits, mixture.teacher) == (True, True, True)
