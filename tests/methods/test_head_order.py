"""Searches over masks, on hand-made losses, against naive loops and enumeration."""

import itertools
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from duo_id.methods.head_order import STRATEGIES, HeadOrder, eliminate, from_scores, select, swap

Losses = Callable[[Tensor], Tensor]
COSTS = [0.5, 0.1, 0.9, 0.3, 0.7, 0.2]  # of six heads, 2 x 3


def additive(masks: Tensor) -> Tensor:
    """The summed costs of the streaming heads."""
    return ((~masks).flatten(1) * torch.tensor(COSTS)).sum(1)


def entangled(seed: int, heads: int = 6) -> Losses:
    """Costs that depend on every pair of streaming heads, with a little noise for each mask."""
    generator = torch.Generator().manual_seed(seed)
    pairs = torch.randn(heads, heads, generator=generator)
    single = torch.rand(heads, generator=generator) + 1
    table = torch.rand(2**heads, generator=generator) * 0.1

    def losses(masks: Tensor) -> Tensor:
        closed = (~masks).flatten(1).float()
        noise = table[(closed.long() * 2 ** torch.arange(heads)).sum(1)]
        return closed @ single + ((closed @ pairs) * closed).sum(1) + noise

    return losses


def cost(losses: Losses, streaming: Sequence[int], shape: tuple[int, int] = (2, 3)) -> float:
    mask = torch.tensor([head not in streaming for head in range(shape[0] * shape[1])])
    return losses(mask.view(1, *shape)).item()


def nothing(_: HeadOrder) -> None:
    pass


def searched(strategy: str, losses: Losses, shape: tuple[int, int] = (2, 3), at_once: int = 1) -> HeadOrder:
    order = HeadOrder(shape)
    STRATEGIES[strategy](order, losses, at_once, nothing)
    return order


@pytest.mark.parametrize("at_once", [1, 2, 3, 4, 6, 9])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_additive_costs_give_the_exact_order(strategy: str, at_once: int) -> None:
    order = searched(strategy, additive, at_once=at_once)
    ranked = torch.tensor(COSTS).argsort().tolist()
    assert order.ranking == ranked
    assert order.undecided == []
    assert order.scores().flatten().argsort().tolist() == ranked


@pytest.mark.parametrize("seed", range(8))
def test_elimination_is_greedy(seed: int) -> None:
    losses, expected = entangled(seed), list[int]()
    while len(expected) < 6:
        left = [head for head in range(6) if head not in expected]
        expected.append(min(left, key=lambda head: cost(losses, [*expected, head])))
    assert searched("elimination", losses).ranking == expected


@pytest.mark.parametrize("seed", range(8))
def test_selection_is_greedy(seed: int) -> None:
    losses, opened = entangled(seed), list[int]()
    while len(opened) < 6:
        left = [head for head in range(6) if head not in opened]
        opened.insert(0, min(left, key=lambda head: cost(losses, [other for other in left if other != head])))
    assert searched("selection", losses).ranking == opened


def test_the_two_differ() -> None:
    assert any(
        searched("elimination", entangled(s)).ranking != searched("selection", entangled(s)).ranking for s in range(8)
    )


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("at_once", [2, 4])
def test_several_heads_a_round_are_the_cheapest_by_themselves(seed: int, at_once: int) -> None:
    losses, expected, opened = entangled(seed), list[int](), list[int]()
    while left := [head for head in range(6) if head not in expected]:
        expected += sorted(left, key=lambda head: cost(losses, [*expected, head]))[:at_once]
    while left := [head for head in range(6) if head not in opened]:
        by_gain = sorted(left, key=lambda head: -cost(losses, [o for o in left if o != head]))
        opened[:0] = by_gain[-at_once:]
    assert searched("elimination", losses, at_once=at_once).ranking == expected
    assert searched("selection", losses, at_once=at_once).ranking == opened


def test_how_many_masks_are_tried() -> None:
    for strategy in STRATEGIES:
        for at_once, expected in ((1, [6, 5, 4, 3, 2]), (2, [6, 4, 2]), (4, [6, 2]), (5, [6])):
            tried: list[int] = []

            def losses(masks: Tensor, tried: list[int] = tried) -> Tensor:
                tried.append(len(masks))
                return additive(masks)

            searched(strategy, losses, at_once=at_once)
            assert tried == expected, "the last head need not be tried"


def test_equal_costs_go_by_number() -> None:
    """As in `HeadPattern`: of two equal heads the first streams first."""
    for strategy in STRATEGIES:
        assert searched(strategy, lambda masks: torch.zeros(len(masks))).ranking == list(range(6))


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("shape", [(1, 1), (1, 2), (3, 1), (4, 5)])
def test_orders_are_permutations_and_scores_a_total_order(strategy: str, shape: tuple[int, int]) -> None:
    heads = shape[0] * shape[1]
    order = HeadOrder(shape)
    assert order.ranking == list(range(heads))

    def look(order: HeadOrder) -> None:
        assert sorted(order.ranking) == list(range(heads))
        scores = order.scores()
        assert scores.shape == shape
        assert len(set(scores.flatten().tolist())) == heads
        assert 0 <= scores.min() <= scores.max() <= 1
        assert scores.flatten()[order.ranking].diff().gt(0).all()

    look(order)
    generator = torch.Generator().manual_seed(0)
    STRATEGIES[strategy](order, lambda masks: torch.rand(len(masks), generator=generator), 2, look)
    look(order)


def test_masks() -> None:
    order = HeadOrder((2, 3))
    assert order.mask([]).all()
    assert order.mask([4, 0]).tolist() == [[False, True, True], [True, False, True]]


def test_from_scores_leaves_heads_between_undecided() -> None:
    scores = torch.tensor([[0.9, 0.1, 0.5], [0.5, 0.2, 0.7]])
    whole = [1, 4, 2, 3, 5, 0]
    order = from_scores(scores, [0.0, 1.0])
    assert (order.shape, order.stream_first, order.undecided, order.stream_last) == ((2, 3), [], whole, [])
    order = from_scores(scores, [1 / 3, 5 / 6])
    assert (order.stream_first, order.undecided, order.stream_last) == ([1, 4], [2, 3, 5], [0])
    assert order.ranking == whole
    assert order.scores().flatten().argsort().tolist() == whole
    order = from_scores(scores, [0.5, 0.5])
    assert (order.stream_first, order.undecided, order.stream_last) == (whole[:3], [], whole[3:])


@pytest.mark.parametrize("seed", range(4))
def test_only_heads_between_are_searched(seed: int) -> None:
    losses, scores = entangled(seed), torch.tensor([[0.9, 0.1, 0.5], [0.5, 0.2, 0.7]])
    first, between, last = [1], [4, 2, 3, 5], [0]
    tried: list[Tensor] = []

    def watched(masks: Tensor) -> Tensor:
        tried.append(masks)
        return losses(masks)

    order = from_scores(scores, [1 / 6, 5 / 6])
    eliminate(order, watched, 1, nothing)
    expected = list(first)
    while len(expected) < 5:
        left = [head for head in sorted(between) if head not in expected]
        expected.append(min(left, key=lambda head: cost(losses, [*expected, head])))
    assert order.ranking == expected + last
    order = from_scores(scores, [1 / 6, 5 / 6])
    select(order, watched, 1, nothing)
    opened: list[int] = []
    while len(opened) < 4:
        left = [head for head in between if head not in opened]
        streaming = [*first, *left]
        opened.insert(0, min(left, key=lambda head: cost(losses, [o for o in streaming if o != head])))
    assert order.ranking == first + opened + last
    everything = torch.cat(tried).flatten(1)
    assert not everything[:, 1].any(), "settled as streaming"
    assert everything[:, 0].all(), "settled as retrieval"


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_an_interrupted_search_keeps_its_order_and_can_be_resumed(strategy: str) -> None:
    losses, calls, saved = entangled(3), [0], list[list[int]]()

    def stops(masks: Tensor) -> Tensor:
        calls[0] += 1
        if calls[0] == 3:
            raise KeyboardInterrupt
        return losses(masks)

    order = HeadOrder((2, 3))
    with pytest.raises(KeyboardInterrupt):
        STRATEGIES[strategy](order, stops, 1, lambda order: saved.append(order.ranking))
    assert len(saved) == 2
    assert len(order.undecided) == 4
    assert order.ranking == saved[-1]
    undisturbed = searched(strategy, losses)
    settled = order.stream_first if strategy == "elimination" else order.stream_last
    expected = undisturbed.ranking[:2] if strategy == "elimination" else undisturbed.ranking[-2:]
    assert settled == expected
    by_hint = sorted(order.undecided, key=lambda head: order.estimates[head].item())
    assert order.undecided == by_hint, "undecided heads are ordered by the last round"
    assert len(set(order.scores().flatten().tolist())) == 6
    STRATEGIES[strategy](order, losses, 1, nothing)
    assert order.ranking == undisturbed.ranking


def naive_swap(losses: Losses, closed: list[int], most: int, width: int) -> list[int]:
    """The final streaming heads: the best pair of promising heads is exchanged while that helps."""
    for _ in range(most):
        opened = [head for head in range(6) if head not in closed]
        to_open = sorted(closed, key=lambda head: cost(losses, [other for other in closed if other != head]))[:width]
        to_close = sorted(opened, key=lambda head: cost(losses, [*closed, head]))[:width]
        candidates = [
            [*(other for other in closed if other != opening), closing] for opening in to_open for closing in to_close
        ]
        best = min(candidates, key=lambda heads: cost(losses, heads))
        if cost(losses, best) >= cost(losses, closed):
            break
        closed = best
    return sorted(closed)


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("streaming", [1, 3, 5])
@pytest.mark.parametrize("width", [1, 2, 6])
@pytest.mark.parametrize("most", [1, 20])
def test_exchanges_are_the_best_of_those_tried_and_never_worsen(
    seed: int, streaming: int, width: int, most: int
) -> None:
    losses = entangled(seed)
    order = HeadOrder((2, 3), list(range(6)))
    values = [cost(losses, order.ranking[:streaming])]

    def look(order: HeadOrder) -> None:
        assert sorted(order.ranking) == list(range(6))
        values.append(cost(losses, order.ranking[:streaming]))

    swap(order, losses, streaming, most, width, look)
    assert order.swaps == len(values) - 1 <= most
    assert all(value < previous for previous, value in itertools.pairwise(values))
    assert sorted(order.ranking[:streaming]) == naive_swap(losses, list(range(streaming)), most, width)
    if not order.swaps:
        assert order.ranking == list(range(6))


@pytest.mark.parametrize("streaming", range(1, 6))
def test_exchanges_reach_the_optimum_where_single_ones_lead_there(streaming: int) -> None:
    start = torch.tensor(COSTS).argsort(descending=True).tolist()  # the worst order
    order = HeadOrder((2, 3), start)
    swap(order, additive, streaming, 20, 6, nothing)
    best = min(itertools.combinations(range(6), streaming), key=lambda heads: cost(additive, heads))
    assert sorted(order.ranking[:streaming]) == sorted(best)
    assert order.swaps == len(set(start[:streaming]) - set(best)), "no exchange is wasted"


def test_an_exchanged_head_takes_the_others_place() -> None:
    order = HeadOrder((2, 3), [2, 1, 5, 3, 0, 4])  # head 2 costs most of those that stream, head 3 least of the others
    swap(order, additive, 3, 1, 6, nothing)
    assert order.ranking == [3, 1, 5, 2, 0, 4]
    assert (order.stream_first, order.stream_last) == ([3, 1, 5], [2, 0, 4])


@pytest.mark.parametrize("streaming", [0, 6])
def test_an_empty_side_leaves_nothing_to_exchange(streaming: int) -> None:
    order = HeadOrder((2, 3), [2, 1, 5, 3, 0, 4])
    swap(order, additive, streaming, 5, 6, nothing)
    assert (order.ranking, order.swaps) == ([2, 1, 5, 3, 0, 4], 0)


def test_exchanges_resume_where_they_stopped() -> None:
    losses, start = (
        additive,
        torch.tensor(COSTS).argsort(descending=True).tolist(),
    )  # all three streaming heads would be exchanged
    whole, parts = HeadOrder((2, 3), list(start)), HeadOrder((2, 3), list(start))
    swap(whole, losses, 3, 2, 6, nothing)
    assert whole.swaps == 2
    swap(parts, losses, 3, 1, 6, nothing)
    swap(parts, losses, 3, 2, 6, nothing)
    assert (parts.ranking, parts.swaps) == (whole.ranking, 2)
    swap(parts, losses, 3, 2, 6, nothing)
    assert (parts.ranking, parts.swaps) == (whole.ranking, 2), "no more exchanges than asked for, however often resumed"


def test_heads_that_cost_the_same_are_not_exchanged() -> None:
    order = HeadOrder((2, 3), list(range(6)))
    swap(order, lambda masks: torch.ones(len(masks)), 3, 5, 6, nothing)
    assert (order.ranking, order.swaps) == (list(range(6)), 0)
