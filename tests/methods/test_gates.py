"""Gates: their initial values and bounds, what is drawn, and the order that results."""

import itertools
import math
from typing import Any

import pytest
import torch

from duo_id.methods.gates import (
    BETA,
    GAMMA,
    GATES,
    ZETA,
    ClampedGates,
    DrawnGates,
    Gates,
    HardConcreteGates,
    NestedGates,
    SigmoidGates,
    StraightThroughGates,
)
from duo_id.patterns.pattern import HeadPattern

CHANCES = {"hard_concrete", "straight_through"}  # each gate is drawn independently
DRAWN = CHANCES | {"nested"}
KEPT_OFF = {"sigmoid", "hard_concrete", "nested"}  # initially kept off 0 and 1, where they would hardly move


@pytest.mark.parametrize("name", GATES)
@pytest.mark.parametrize("initial", [0.0, 0.25, 0.5, 1.0])
@pytest.mark.parametrize("temperature", [1.0, 0.3])
def test_gates_start_at_their_initial_openness_in_float32(name: str, initial: float, temperature: float) -> None:
    gates = GATES[name](3, 2, initial, temperature)
    openness, expected = gates.openness(), initial
    if name in KEPT_OFF:
        expected = min(max(initial, 0.01), 0.99)
    torch.testing.assert_close(openness, torch.full((3, 2), expected), atol=1e-6, rtol=0)
    assert gates.weight.dtype == gates.alpha().dtype == openness.dtype == torch.float32
    assert gates.weight.requires_grad
    assert [name for name, _ in gates.named_parameters()] == ["weight"]
    assert torch.equal(gates.mean, torch.full((3, 2), initial))


@pytest.mark.parametrize("name", GATES)
def test_openness_and_alpha_are_in_0_to_1(name: str) -> None:
    gates = GATES[name](2, 3, 0.3)
    gates.weight.data += torch.linspace(-0.25, 0.6, 6).view(2, 3)
    for _ in range(5):
        alpha, openness = gates.alpha(), gates.openness()
        assert alpha.min() >= 0
        assert alpha.max() <= 1
        assert openness.min() >= 0
        assert openness.max() <= 1
        if name not in DRAWN:
            assert torch.equal(alpha, openness)


@pytest.mark.parametrize("name", GATES)
@pytest.mark.parametrize("what", ["openness", "alpha"])
def test_every_weight_opens_its_gate(name: str, what: str) -> None:
    gates, total = GATES[name](3, 2, 0.5), torch.zeros(6)
    for _ in range(40):  # draws at the clamp have no gradient
        value = getattr(gates, what)().flatten()
        gradients = [torch.autograd.grad(slope, gates.weight, retain_graph=True)[0].flatten() for slope in value]
        slope = torch.stack(gradients).diagonal()
        assert (slope >= 0).all()
        total += slope
    assert (total > 0).all()


def test_sigmoid_gates_are_sharper_at_low_temperature() -> None:
    gates = SigmoidGates(1, 2, 0.5, 0.25)
    gates.weight.data = torch.tensor([[1.0, -0.5]])
    expected = [1 / (1 + math.exp(-4.0)), 1 / (1 + math.exp(2.0))]
    torch.testing.assert_close(gates.alpha(), torch.tensor([expected]))


@pytest.mark.parametrize("name", ["clamp", "straight_through"])
def test_projection_brings_gates_back_to_zero_and_one_and_leaves_the_others(name: str) -> None:
    gates = GATES[name](2, 2)
    parameter = gates.weight
    parameter.data = torch.tensor([[-0.3, 1.2], [0.4, 0.999]])
    gates.project_()
    assert gates.weight is parameter, "the optimizer holds on to this parameter"
    assert torch.equal(gates.openness(), torch.tensor([[0.0, 1.0], [0.4, 0.999]]))


@pytest.mark.parametrize("name", ["sigmoid", "hard_concrete"])
def test_weights_that_are_no_fractions_are_not_clamped(name: str) -> None:
    gates = GATES[name](1, 2)
    gates.weight.data = torch.tensor([[-3.0, 7.0]])
    gates.project_()
    assert gates.weight.tolist() == [[-3.0, 7.0]]


def test_gates_at_the_edge_still_get_their_gradient() -> None:
    gates = ClampedGates(1, 3)
    gates.weight.data = torch.tensor([[0.0, 1.0, 0.5]])
    (gates.alpha() * torch.tensor([[2.0, 3.0, 4.0]])).sum().backward()
    assert gates.weight.grad is not None
    assert gates.weight.grad.tolist() == [[2.0, 3.0, 4.0]]


@pytest.mark.parametrize("log_alpha", [-3.0, -0.4, 0.0, 1.5, 4.0])
def test_hard_concrete_is_the_published_formula(log_alpha: float) -> None:
    """Louizos et al. 2018, equations 10 to 13, number by number."""
    gates = HardConcreteGates(1, 1)
    gates.weight.data.fill_(log_alpha)
    assert (BETA, GAMMA, ZETA) == (2 / 3, -0.1, 1.1)

    def sigmoid(x: float) -> float:
        return 1 / (1 + math.exp(-x))

    open_chance = sigmoid(log_alpha - 2 / 3 * math.log(0.1 / 1.1))
    assert gates.openness().item() == pytest.approx(open_chance, abs=1e-6)
    u = float(HardConcreteGates(1, 1).uniform())
    drawn = sigmoid((math.log(u) - math.log(1 - u) + log_alpha) / (2 / 3))
    assert gates.alpha().item() == pytest.approx(min(1, max(0, drawn * 1.2 - 0.1)), abs=1e-5)
    gates.eval()
    assert gates.alpha().item() == pytest.approx(min(1, max(0, sigmoid(log_alpha) * 1.2 - 0.1)), abs=1e-6)


@pytest.mark.parametrize("name", sorted(CHANCES))
def test_openness_is_how_often_a_drawn_gate_is_not_0(name: str) -> None:
    gates = GATES[name](2, 20_000)
    gates.weight.data = torch.tensor([[0.3], [0.85]]).expand(2, 20_000).clone()
    with torch.no_grad():
        often = sum((gates.alpha() != 0).double().mean(1) for _ in range(5)) / 5
        openness = gates.openness()[:, 0].double()
    torch.testing.assert_close(often, openness, atol=0.006, rtol=0)  # four standard errors of 1e5 draws


def test_straight_through_gates_are_0_or_1_and_pass_the_gradient_on_unchanged() -> None:
    gates = StraightThroughGates(50, 40)
    gates.weight.data = torch.rand(50, 40, generator=torch.Generator().manual_seed(5))
    for training in (True, False):
        gates.train(training)
        alpha = gates.alpha()
        assert set(alpha.flatten().tolist()) == {0.0, 1.0}, "not nearly, but exactly"
        factor = torch.randn(50, 40)
        (gradient,) = torch.autograd.grad((alpha * factor).sum(), gates.weight)
        assert torch.equal(gradient, factor)


def test_straight_through_gates_at_0_and_1_are_certain() -> None:
    gates = StraightThroughGates(100, 200)
    gates.weight.data = (torch.arange(200) % 2).float().expand(100, 200).clone()
    for _ in range(10):
        assert torch.equal(gates.alpha(), gates.weight)
    gates.eval()
    gates.weight.data.fill_(0.5)
    assert gates.alpha().min() == 1
    gates.weight.data.fill_(0.499)
    assert gates.alpha().max() == 0


def nested(weights: list[float], **settings: Any) -> NestedGates:
    gates = NestedGates(1, len(weights), 0.5, **settings)
    gates.weight.data = torch.tensor([weights])
    return gates


def test_nested_masks_open_the_heads_of_the_largest_weights_within_the_budget() -> None:
    weights = torch.randn(10, generator=torch.Generator().manual_seed(2)).tolist()
    gates, order, opened = nested(weights, budgets=(0.2, 0.9)), sorted(weights, reverse=True), set()
    for _ in range(60):
        alpha = gates.alpha()
        assert set(alpha.flatten().tolist()) <= {0.0, 1.0}, "not nearly, but exactly"
        kept = int(alpha.sum())
        assert sorted(gates.weight[alpha == 1].tolist(), reverse=True) == pytest.approx(order[:kept])
        opened.add(kept)
    assert opened == {1, 2, 3, 4, 5, 6, 7, 8}
    gates.eval()
    assert gates.alpha().sum() == 4, "outside training the middle budget: 55% of 10 stream"


@pytest.mark.parametrize("seed", [0, 1, 12345])
def test_budgets_are_drawn_evenly(seed: int) -> None:
    gates = nested([0.0] * 100, budgets=(0.0, 1.0), seed=seed)
    kept = sorted(int(gates.alpha().sum()) for _ in range(50))
    gaps = [larger - smaller for smaller, larger in itertools.pairwise(kept)]
    assert kept[0] <= 5
    assert kept[-1] >= 95
    assert max(gaps) <= 5


def test_seeds_draw_other_budgets_and_not_the_same_ones_later() -> None:
    series = []
    for seed in range(4):
        gates = nested([0.0] * 1000, budgets=(0.0, 1.0), seed=seed)
        series.append([int(gates.alpha().sum()) for _ in range(60)])
    for first, second in itertools.combinations(series, 2):
        for shift in range(-20, 21):
            pairs = list(zip(first[20:40], second[20 + shift : 40 + shift], strict=True))
            assert max(abs(a - b) for a, b in pairs) > 1


@pytest.mark.parametrize(("heads", "sparsity"), [(45, 0.5), (90, 0.35), (90, 0.65), (10, 0.25), (6, 0.9), (90, 1.0)])
def test_as_many_heads_are_open_as_in_the_mask_of_a_pattern(heads: int, sparsity: float) -> None:
    gates = nested(torch.linspace(-1, 1, heads).tolist(), budgets=(sparsity, sparsity))
    mask = HeadPattern(gates.scores(), 1, 1).binarize(sparsity=sparsity).retrieval
    alpha = gates.alpha()
    assert alpha.sum() == max(mask.sum(), 1), "and one at least"
    if mask.any():
        assert torch.equal(alpha.bool(), mask)


@pytest.mark.parametrize("temperature", [1e-3, 0.3, 1e3])
@pytest.mark.parametrize("gap", [1e-3, 1.0, 200.0])
def test_gradients_of_nested_gates_are_numbers(temperature: float, gap: float) -> None:
    gates = nested([gap, 0.0, -gap], budgets=(0.5, 0.5), temperature=temperature)
    (gradient,) = torch.autograd.grad((gates.alpha() * torch.tensor([1.0, -2.0, 3.0])).sum(), gates.weight)
    assert gradient.isfinite().all()
    assert gradient.sum().abs() < 1e-3


def test_equal_nested_gates_are_opened_at_random() -> None:
    gates = nested([0.0] * 8, budgets=(0.5, 0.5))
    first = [gates.alpha() for _ in range(10)]
    assert all(alpha.sum() == 4 for alpha in first)
    assert len({tuple(alpha.flatten().tolist()) for alpha in first}) > 3


def test_nested_gates_have_the_gradient_of_a_relaxed_mask_whose_threshold_keeps_the_budget() -> None:
    """Against finite differences of sigmoids whose threshold is solved for."""
    weights, temperature = [0.9, 0.1, -0.2, -1.0], 0.5
    gates = nested(weights, budgets=(0.5, 0.5), temperature=temperature)
    gates.eval()
    value = torch.tensor([3.0, -1.0, 2.0, 0.5], dtype=torch.float64)
    (gradient,) = torch.autograd.grad((gates.alpha().double() * value).sum(), gates.weight)

    def relaxed(moved: torch.Tensor) -> torch.Tensor:
        low, high = -10.0, 10.0
        for _ in range(80):
            middle = (low + high) / 2
            too_many = torch.sigmoid((moved - middle) / temperature).sum() > kept
            low, high = (middle, high) if too_many else (low, middle)
        return torch.sigmoid((moved - low) / temperature)

    weight = torch.tensor(weights, dtype=torch.float64)
    kept = float(torch.sigmoid((weight + 0.05) / temperature).sum())
    step = 1e-5
    expected = [
        float((value * (relaxed(weight + step * unit) - relaxed(weight - step * unit))).sum()) / (2 * step)
        for unit in torch.eye(4, dtype=torch.float64)
    ]
    torch.testing.assert_close(gradient[0].tolist(), expected, atol=1e-5, rtol=1e-4)
    assert gradient.sum().abs() < 1e-6, "heads compete: what one wins others lose"


def drawn(name: str, seed: int = 0) -> DrawnGates:
    gates = GATES[name](4, 5, 0.5, seed=seed)
    assert isinstance(gates, DrawnGates)
    return gates


@pytest.mark.parametrize("name", sorted(DRAWN))
def test_what_is_drawn_is_a_function_of_seed_and_draws(name: str) -> None:
    first, same, other = drawn(name, 3), drawn(name, 3), drawn(name, 4)
    state = torch.get_rng_state()
    series = [first.alpha() for _ in range(6)]
    torch.manual_seed(99)  # the global state has no part in it
    assert all(torch.equal(same.alpha(), alpha) for alpha in series)
    torch.set_rng_state(state)
    assert any(not torch.equal(other.alpha(), alpha) for alpha in series)
    noise = [drawn(name, seed).uniform() for seed in (0, 1, 2**32 - 1)] + [first.uniform(), first.uniform()]
    assert all(not torch.equal(left, right) for left, right in itertools.combinations(noise, 2))
    assert all((left > 0).all() and (left < 1).all() for left in noise)


@pytest.mark.parametrize("name", sorted(DRAWN))
def test_a_checkpoint_continues_the_draws(name: str) -> None:
    undisturbed, stopped, resumed = drawn(name, 7), drawn(name, 7), drawn(name, 7)
    for _ in range(3):
        undisturbed.alpha()
        stopped.alpha()
    stopped.weight.data += 0.1
    stopped.project_()
    resumed.load_state_dict(stopped.state_dict())
    assert resumed.draws == stopped.draws == 3
    assert torch.equal(resumed.weight, stopped.weight)
    assert torch.equal(resumed.scores(), stopped.scores())
    assert all(torch.equal(resumed.uniform(), undisturbed.uniform()) for _ in range(4))


@pytest.mark.parametrize("name", sorted(DRAWN))
def test_nothing_is_drawn_outside_training(name: str) -> None:
    gates = drawn(name)
    gates.eval()
    assert torch.equal(gates.alpha(), gates.alpha())
    assert gates.draws == 0
    gates.train().alpha()
    assert gates.draws == 1


@pytest.mark.parametrize("name", GATES)
def test_scores_mix_openness_with_its_mean_over_the_steps(name: str) -> None:
    gates, courses = GATES[name](2, 2, 0.5), []
    initial = gates.scores()
    torch.testing.assert_close(initial, gates.openness())
    for step in (0.2, -0.15, 0.1):
        gates.weight.data += step * torch.tensor([[1.0, 2.0], [-1.0, 0.5]])
        gates.project_()
        courses.append(gates.openness().detach().clone())
    if name == "nested":  # late steps count most: s(s+1)(s+2) of Shamir and Zhang 2013, which is about s to the third
        expected = (6 * courses[0] + 24 * courses[1] + 60 * courses[2]) / 90
    else:
        expected = 0.99 * courses[-1] + 0.01 * torch.stack(courses).mean(0)
    torch.testing.assert_close(gates.scores(), expected)
    assert not gates.scores().requires_grad
    assert gates.steps == 3


def test_clamped_ties_are_ordered_by_their_course() -> None:
    gates = ClampedGates(1, 4)
    courses = torch.tensor([[[1.0, 0.9, 0.2, 0.0]], [[1.0, 0.7, 0.1, 0.0]], [[1.3, 1.01, -0.1, -0.4]]])
    for weight in courses:
        gates.weight.data = weight.clone()
        gates.project_()
    assert gates.openness().tolist() == [[1, 1, 0, 0]]
    scores = gates.scores().flatten()
    assert scores.argsort(descending=True).tolist() == [0, 1, 2, 3]
    assert len(set(scores.tolist())) == 4
    assert scores[0] == 1
    assert scores[3] == 0


def test_the_course_never_inverts_gates_that_differ_by_more_than_its_weight() -> None:
    """Not even in the worst case: one gate open all along that closes at the end, against the reverse."""
    gates = ClampedGates(1, 2)
    for difference in (1.02 * Gates.MEAN_WEIGHT, 2 * Gates.MEAN_WEIGHT, 0.5):
        gates.mean.copy_(torch.tensor([[1.0, 0.0]]))
        gates.weight.data = torch.tensor([[0.4, 0.4 + difference]])
        low, high = gates.scores().flatten().tolist()
        assert 0 <= low < high <= 1
