"""Prices: exact for quadratic losses from few samples, and of long enough samples alone."""

import torch

from duo_id.methods.span_prices import SpanPrices

COSTS = torch.tensor([[[3.0, 1.0, 0.25, 0.0], [0.5, 0.5, 0.0, 0.0]]], dtype=torch.float64)  # a layer of two heads
ALL_REAL = torch.tensor([True, True, True])


def quadratic_rises(level: torch.Tensor) -> torch.Tensor:
    """Slopes where each step between two levels is a quadratic with its minimum at the larger span."""
    steps = -COSTS.diff(dim=-1)
    rises = torch.zeros(2, *level.shape, dtype=torch.float64)
    for head, at in enumerate(level[0].tolist()):
        if at < 3:
            rises[1, 0, head] = -2 * steps[0, head, at]
    return rises


def test_both_sides_of_a_quadratic_give_its_difference() -> None:
    prices = SpanPrices(torch.zeros(1, 2, 4), weight=1e-12)
    for level in range(4):
        at = torch.full((1, 2), level)
        prices.add(at, quadratic_rises(at), ALL_REAL)
    torch.testing.assert_close(prices.costs(), COSTS)
    assert prices.count == 4


def test_curvature_is_the_start_and_fades() -> None:
    prices = SpanPrices(COSTS)
    torch.testing.assert_close(prices.costs(), COSTS)
    for _ in range(200):
        prices.add(torch.full((1, 2), 2), torch.zeros(2, 1, 2), ALL_REAL)  # full attention saves nothing after all
    assert (prices.costs()[..., 2] < 1e-3).all()
    torch.testing.assert_close(
        prices.costs()[..., 0] - prices.costs()[..., 1], COSTS[..., 0] - COSTS[..., 1], atol=1, rtol=0
    )


def test_short_samples_say_nothing_about_spans_that_they_fit() -> None:
    prices = SpanPrices(COSTS)
    for level in (2, 3):
        prices.add(torch.full((1, 2), level), torch.full((2, 1, 2), -9.0), torch.tensor([True, True, False]))
    steps = -prices.costs().diff(dim=-1)
    torch.testing.assert_close(steps[..., 2], -COSTS.diff(dim=-1)[..., 2])
    assert not torch.allclose(steps[..., 1], -COSTS.diff(dim=-1)[..., 1]), "from level 2 to 1 it is real"


def test_late_samples_weigh_more() -> None:
    prices = SpanPrices(torch.zeros(1, 1, 2), weight=1e-12)
    for rise in (0.0, 0.0, 3.0):
        prices.add(torch.ones(1, 1, dtype=torch.long), torch.full((2, 1, 1), rise), torch.tensor([True]))
        prices.add(torch.zeros(1, 1, dtype=torch.long), torch.full((2, 1, 1), -rise), torch.tensor([True]))
    found = prices.costs()[0, 0, 0].item()
    assert found > 1.2, "above the plain mean, 1"
