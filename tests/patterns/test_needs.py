"""Needs hold a finite cost for every head and span, and a pattern keeps them for the heads it scores."""

import math
from dataclasses import replace

import pytest
import torch

from duo_id import HeadPattern, SpanNeeds
from duo_id.common.documents import MOST_TOKENS
from duo_id.common.errors import UserError
from duo_id.patterns.combining import average

LEVELS = (8, 64, -1)
COSTS = torch.tensor([[[0.5, 0.25, 0.0], [-0.125, 0.75, 0.0]], [[1.0, 0.5, 0.0], [0.0, 0.0, 0.0]]])


def test_needs_are_copied_as_float32() -> None:
    given = COSTS.double()
    needs = SpanNeeds(list(LEVELS), given)  # type: ignore[arg-type]
    given[0, 0, 0] = 9
    assert needs == SpanNeeds(LEVELS, COSTS)
    assert needs.costs.dtype == torch.float32
    assert needs != SpanNeeds(LEVELS, given)
    assert needs != SpanNeeds((8, 65, -1), COSTS)


def test_a_pattern_keeps_needs_of_gated_layers_alone() -> None:
    pattern = HeadPattern(torch.rand(2, 2), 4, 8, (1,), needs=SpanNeeds(LEVELS, COSTS))
    assert pattern.needs is not None
    assert pattern.needs.costs[0].tolist() == [[0] * 3] * 2
    assert pattern.needs.costs[1].equal(COSTS[1])
    assert repr(pattern).endswith("needs at 3 spans)")
    assert pattern != replace(pattern, needs=None)
    with pytest.raises(UserError, match="needs are of 2 layers x 2 KV heads, but the scores of 3 x 2"):
        HeadPattern(torch.rand(3, 2), 4, 8, needs=SpanNeeds(LEVELS, COSTS))
    with pytest.raises(UserError, match="needs: a dict is not a SpanNeeds"):
        HeadPattern(torch.rand(2, 2), 4, 8, needs={"levels": LEVELS})  # type: ignore[arg-type]


def test_seeds_share_their_mean_needs_at_the_spans_that_all_have() -> None:
    def seed(levels: tuple[int, ...] | None, factor: float) -> HeadPattern:
        needs = None if levels is None else SpanNeeds(levels, factor * COSTS)
        return HeadPattern(torch.rand(2, 2), 4, 8, needs=needs)

    assert average([seed(LEVELS, 1), seed(LEVELS, 3)]).needs == SpanNeeds(LEVELS, 2 * COSTS)
    assert average([seed(LEVELS, 1), seed((8, 16, -1), 3)]).needs == SpanNeeds((8, -1), 2 * COSTS[..., [0, 2]])
    assert average([seed(LEVELS, 1), seed((9, 16, -1), 3)]).needs is None
    assert average([seed(LEVELS, 1), seed(None, 0)]).needs is None


@pytest.mark.parametrize(
    ("levels", "costs", "reason"),
    [
        pytest.param((-1,), COSTS[..., 2:], r"levels=\[-1\] must be .* at least one, then -1", id="only full"),
        pytest.param((8, 64), COSTS[..., 1:], r"levels=\[8, 64\] must", id="without full"),
        pytest.param((64, 8, -1), COSTS, "in ascending order", id="descending"),
        pytest.param((8, 8, -1), COSTS, "in ascending order", id="twice"),
        pytest.param((0, 8, -1), COSTS, "spans of 1 to", id="zero"),
        pytest.param((8, MOST_TOKENS + 1, -1), COSTS, "spans of 1 to", id="beyond any context"),
        pytest.param((8.0, 64, -1), COSTS, r"levels=\[8\.0", id="float"),
        pytest.param((True, 64, -1), COSTS, r"levels=\[True", id="bool"),
        pytest.param(("8", 64, -1), COSTS, r"levels=\['8'", id="text"),
        pytest.param(8, COSTS, "levels=8 must", id="a number"),
        pytest.param(LEVELS, None, "costs must be numbers of shape", id="no costs"),
        pytest.param(LEVELS, [[[0.5, 0.25, 0], [0]]], "costs must be numbers of shape", id="ragged costs"),
        pytest.param((8, 64, -1), COSTS[0], r"shape \(layers, KV heads, 3 levels\), not \(2, 3\)", id="two dimensions"),
        pytest.param((8, -1), COSTS, r"2 levels\), not \(2, 2, 3\)", id="more costs than levels"),
        pytest.param((8, 64, -1), COSTS * math.nan, "layer 0, KV head 0 at span 8 is nan: it must be finite", id="nan"),
        pytest.param((8, 64, -1), COSTS + 1, "KV head 0 at span -1 is 1.0: it must be 0", id="full costs"),
    ],
)
def test_what_cannot_be_needs_is_refused(levels: tuple, costs: torch.Tensor, reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        SpanNeeds(levels, costs)
