"""Spans keep within their budget, exactly; they are the best where brute force can tell, and nest as budgets grow."""

import random
import warnings
from fractions import Fraction
from itertools import product

import pytest
import torch

from duo_id import HeadPattern, HeadSpans, SpanNeeds
from duo_id.common.errors import UserError

SINK, LENGTH = 2, 100
BUDGETS = [Fraction(number, 40) for number in range(1, 41)]


def tokens_of(span: int, length: int = LENGTH) -> int:
    return length if span == -1 else min(length, SINK + span)


def a_pattern(rng: random.Random, kind: str = "noisy", levels: tuple[int, ...] = (3, 10, 30, -1)) -> HeadPattern:
    """Five heads in three layers, one of them without gates; costs fall with the span, but for noise."""
    costs = torch.zeros(3, 2, len(levels))
    for layer, head, level in product(range(3), range(2), range(len(levels) - 1)):
        falling = rng.random() / (level + 1)
        costs[layer, head, level] = falling + rng.uniform(-0.5, 0.5) if kind == "noisy" else round(4 * falling) / 4
    return HeadPattern(
        torch.rand(3, 2),
        SINK,
        7,
        (0, 2),
        needs=SpanNeeds(levels, costs.sort(-1, descending=True)[0] if kind == "ties" else costs),
    )


def heads_of(spans: HeadSpans) -> list[int]:
    return spans.spans[list(spans.gated_layers)].flatten().tolist()


def kept(spans: HeadSpans, length: int = LENGTH) -> int:
    return sum(tokens_of(span, length) for span in heads_of(spans))


def cost_of(pattern: HeadPattern, spans: list[int]) -> float:
    """What these spans of gated heads cost together; no longer span costs more than a shorter one."""
    needs = pattern.needs
    assert needs is not None
    levels, costs = list(needs.levels), needs.costs[list(pattern.gated_layers)].flatten(0, 1).tolist()
    return sum(min(row[: levels.index(span) + 1]) for row, span in zip(costs, spans, strict=True))


def all_choices(pattern: HeadPattern) -> list[tuple[int, float, list[int]]]:
    """Tokens, cost and spans of every allocation there is, by brute force."""
    assert pattern.needs is not None
    choices = product(pattern.needs.levels, repeat=pattern.gated_heads)
    return [(sum(map(tokens_of, spans)), cost_of(pattern, list(spans)), list(spans)) for spans in choices]


def budgets_of(pattern: HeadPattern) -> list[float]:
    assert pattern.needs is not None
    smallest = tokens_of(pattern.needs.levels[0])
    return [float(budget) for budget in BUDGETS if budget * LENGTH >= smallest]


@pytest.mark.parametrize("kind", ["noisy", "ties"])
@pytest.mark.parametrize("seed", range(12))
def test_budgets_are_exact_and_costs_near_the_best(seed: int, kind: str) -> None:
    pattern = a_pattern(random.Random(seed), kind)
    assert pattern.needs is not None
    choices, levels = all_choices(pattern), pattern.needs.levels
    before = float("inf")
    for budget in budgets_of(pattern):
        spans = pattern.allocate(cache=budget, length=LENGTH)
        most = Fraction(str(budget)) * pattern.gated_heads * LENGTH
        assert kept(spans) <= most
        assert spans.cache_share(LENGTH) == kept(spans) / (pattern.gated_heads * LENGTH) <= budget
        assert bool((spans.spans[1] == -1).all())
        chosen, left = heads_of(spans), most - kept(spans)
        longer = [tokens_of(level) - tokens_of(span) for span in chosen for level in levels]
        assert not any(0 < more <= left for more in longer), "a head's longer span would fit"
        cost = cost_of(pattern, chosen)
        best_of_these = min(cost for tokens, cost, _ in choices if tokens <= kept(spans))
        best = min(cost for tokens, cost, _ in choices if tokens <= most)
        dearest = max(tokens_of(-1) - tokens_of(span) for span in levels)
        enough = min(cost for tokens, cost, _ in choices if tokens <= most - dearest) if most - dearest > 4 * 5 else 9
        assert best <= best_of_these <= cost + 1e-9 <= enough + 2e-9, "at most one step behind the best"
        assert cost <= before + 1e-9, "a larger budget costs no more"
        before = cost


@pytest.mark.parametrize("seed", range(12))
def test_on_the_hull_it_is_the_best_and_nested(seed: int) -> None:
    """Budgets that steps along the hulls meet exactly, found by walking along them with plain fractions."""
    pattern = a_pattern(random.Random(seed))
    choices, before = all_choices(pattern), None
    for budget in sorted(hull_budgets(pattern)):
        share = budget / (pattern.gated_heads * LENGTH)
        spans = heads_of(pattern.allocate(cache=share, length=LENGTH))
        assert sum(map(tokens_of, spans)) == budget
        assert cost_of(pattern, spans) == pytest.approx(min(cost for tokens, cost, _ in choices if tokens <= budget))
        two_values = [cost for tokens, cost, chosen in choices if tokens <= budget and set(chosen) <= {10, -1}]
        assert cost_of(pattern, spans) <= min(two_values, default=9) + 1e-9
        lengths = [tokens_of(span) for span in spans]
        assert before is None or all(low <= high for low, high in zip(before, lengths, strict=True))
        before = lengths


def hull_budgets(pattern: HeadPattern) -> set[int]:
    """Tokens at which the best cost over all budgets has a corner: there greedy and brute force must agree."""
    best: dict[int, float] = {}
    for tokens, cost, _ in all_choices(pattern):
        best[tokens] = min(cost, best.get(tokens, cost))
    corners: list[tuple[int, float]] = []
    for tokens, cost in sorted(best.items()):
        while len(corners) > 1 and _below(corners[-2], corners[-1], (tokens, cost)):
            corners.pop()
        if not corners or cost < corners[-1][1] - 1e-6:
            corners.append((tokens, cost))
    return {tokens for tokens, _ in corners}


def _below(first: tuple[int, float], middle: tuple[int, float], last: tuple[int, float]) -> bool:
    """Whether the middle point lies on or above the line between the others."""
    share = (middle[0] - first[0]) / (last[0] - first[0])
    return middle[1] >= first[1] + share * (last[1] - first[1]) - 1e-6


@pytest.mark.parametrize("seed", range(12))
def test_without_needs_the_heads_of_highest_score_see_everything(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(0, 4, (3, 4), generator=generator).float()  # with ties
    pattern = HeadPattern(scores, SINK, 7, (0, 2))
    for full in range(9):
        budget = full * LENGTH + (8 - full) * tokens_of(7)
        for more in (0, 1, LENGTH - tokens_of(7) - 1):
            if budget + more <= 8 * LENGTH:
                with warnings.catch_warnings(record=True) as of_spans:
                    spans = pattern.allocate(cache=(budget + more) / (8 * LENGTH), length=LENGTH)
                with warnings.catch_warnings(record=True) as of_mask:
                    mask = pattern.binarize(sparsity=1 - full / 8)
                assert spans == HeadSpans(mask.spans, SINK, (0, 2))
                said, expected = ([str(each.message) for each in caught] for caught in (of_spans, of_mask))
                assert [text.partition(" separates ")[2] for text in said] == [
                    text.partition(" separates ")[2] for text in expected
                ]


def test_ties_go_to_the_higher_score_then_to_later_heads() -> None:
    costs = torch.tensor([[[1.0, 0.0]] * 2] * 2)
    even = HeadPattern(torch.ones(2, 2), SINK, 7, needs=SpanNeeds((8, -1), costs))
    assert even.allocate(cache=0.4, length=LENGTH).spans.tolist() == [[8, 8], [8, -1]]
    scored = HeadPattern(torch.tensor([[1.0, 2.0], [1.0, 1.0]]), SINK, 7, needs=SpanNeeds((8, -1), costs))
    assert scored.allocate(cache=0.4, length=LENGTH).spans.tolist() == [[8, -1], [8, 8]]
    assert scored.allocate(cache=0.7, length=LENGTH).spans.tolist() == [[8, -1], [8, -1]]


def test_where_a_longer_span_seems_to_cost_more_the_score_decides() -> None:
    """Seeing everything costs nothing, so costs below 0 are noise, not a reason to see less."""
    costs = torch.tensor([[[-0.5, 0.25, 0.0], [-0.125, -0.25, 0.0]]])
    pattern = HeadPattern(torch.tensor([[2.0, 1.0]]), SINK, 7, needs=SpanNeeds((8, 18, -1), costs))
    assert pattern.allocate(cache=0.15, length=LENGTH).spans.tolist() == [[8, 18]], "the only step that saves"
    assert pattern.allocate(cache=0.6, length=LENGTH).spans.tolist() == [[-1, 18]]


def test_a_share_is_the_decimal_that_was_written() -> None:
    """0.29 * 100 is 28.999999999999996 in binary."""
    pattern = HeadPattern(torch.ones(1, 1), SINK, 7, needs=SpanNeeds((26, 27, 28, -1), torch.zeros(1, 1, 4)))
    assert pattern.allocate(cache=0.29, length=100).spans.tolist() == [[27]]


def test_spans_as_long_as_the_context_are_all_tokens() -> None:
    needs = SpanNeeds((8, 98, 99, -1), torch.tensor([[[3.0, 2.0, 1.0, 0.0]]]))
    pattern = HeadPattern(torch.ones(1, 1), SINK, 7, needs=needs)
    assert pattern.allocate(cache=1.0, length=LENGTH).spans.tolist() == [[-1]]
    assert pattern.allocate(cache=0.99, length=LENGTH).spans.tolist() == [[8]]
    assert pattern.allocate(cache=1.0, length=LENGTH + 1).spans.tolist() == [[-1]]
    assert pattern.allocate(cache=0.995, length=LENGTH + 1).spans.tolist() == [[98]]


@pytest.mark.parametrize("needs", [None, SpanNeeds((7, 30, -1), torch.zeros(2, 2, 3))], ids=["scores", "needs"])
def test_a_context_that_every_span_holds_is_said(needs: SpanNeeds | None) -> None:
    pattern = HeadPattern(torch.ones(2, 2), SINK, 7, needs=needs)
    with pytest.warns(UserWarning, match="length=9: sink_size=2 and the smallest span, 7 tokens, hold") as caught:
        spans = pattern.allocate(cache=0.25, length=9)
    assert bool((spans.spans == -1).all())
    assert caught[0].filename == __file__
    with warnings.catch_warnings(action="error"):
        pattern.allocate(cache=0.9, length=10)
        assert bool((pattern.allocate(cache=1, length=10).spans == -1).all())


@pytest.mark.parametrize(
    ("cache", "length", "reason"),
    [
        pytest.param(
            0.0899, LENGTH, "sink_size=2 and the smallest span, 7 .*: cache must be at least 0.09$", id="small"
        ),
        pytest.param(0.5, 17, "cache must be at least 0.5295$", id="rounded up"),
        pytest.param(0, LENGTH, r"cache=0 must lie in \(0, 1\]", id="zero"),
        pytest.param(1.5, LENGTH, r"cache=1.5 must lie in", id="more than all"),
        pytest.param(float("nan"), LENGTH, r"cache=nan must lie in", id="nan"),
        pytest.param(True, LENGTH, r"cache=True must lie in", id="bool"),
        pytest.param("0.5", LENGTH, r"cache='0.5' must lie in", id="text"),
        pytest.param(0.5, 0, "length=0 must be a number of tokens from 1", id="no tokens"),
        pytest.param(0.5, 100.0, "length=100.0 must be", id="float length"),
        pytest.param(0.5, 2**40, "length=1099511627776 must be", id="beyond any context"),
    ],
)
def test_budgets_that_cannot_be_kept_are_refused(cache: float, length: int, reason: str) -> None:
    with pytest.raises(UserError, match=reason) as error:
        HeadPattern(torch.ones(2, 2), SINK, 7).allocate(cache=cache, length=length)
    assert "\n" not in str(error.value)
