"""Searches over masks, on losses made by hand, against naive loops and enumeration."""

import itertools
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from duo_id.methods.head_order import STRATEGIES, Order, eliminate, from_scores, select, swap

Losses = Callable[[Tensor], Tensor]
COSTS = [0.5, 0.1, 0.9, 0.3, 0.7, 0.2]  # of six heads, 2 x 3


def additive(masks: Tensor) -> Tensor:
    """What each streaming head costs, added up."""
    return ((~masks).flatten(1) * torch.tensor(COSTS)).sum(1)


def entangled(seed: int, heads: int = 6) -> Losses:
    """Costs that depend on every pair of streaming heads, and a little on each whole mask."""
    generator = torch.Generator().manual_seed(seed)
    pairs = torch.randn(heads, heads, generator=generator)
    own = torch.rand(heads, generator=generator) + 1
    table = torch.rand(2**heads, generator=generator) * 0.1

    def losses(masks: Tensor) -> Tensor:
        closed = (~masks).flatten(1).float()
        whole = table[(closed.long() * 2 ** torch.arange(heads)).sum(1)]
        return closed @ own + ((closed @ pairs) * closed).sum(1) + whole

    return losses


def cost(losses: Losses, streaming: Sequence[int], shape: tuple[int, int] = (2, 3)) -> float:
    mask = torch.tensor([head not in streaming for head in range(shape[0] * shape[1])])
    return losses(mask.view(1, *shape)).item()


def nothing(order: Order) -> None:
    pass


def searched(strategy: str, losses: Losses, shape: tuple[int, int] = (2, 3), at_once: int = 1) -> Order:
    order = Order(shape)
    STRATEGIES[strategy](order, losses, at_once, nothing)
    return order


@pytest.mark.parametrize("at_once", [1, 2, 3, 4, 6, 9])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_additive_costs_give_the_exact_order(strategy: str, at_once: int) -> None:
    order = searched(strategy, additive, at_once=at_once)
    ranked = torch.tensor(COSTS).argsort().tolist()
    assert order.all == ranked
    assert order.open == []
    assert order.scores().flatten().argsort().tolist() == ranked


@pytest.mark.parametrize("seed", range(8))
def test_elimination_is_greedy(seed: int) -> None:
    losses, expected = entangled(seed), list[int]()
    while len(expected) < 6:
        left = [head for head in range(6) if head not in expected]
        expected.append(min(left, key=lambda head: cost(losses, [*expected, head])))
    assert searched("elimination", losses).all == expected


@pytest.mark.parametrize("seed", range(8))
def test_selection_is_greedy(seed: int) -> None:
    losses, opened = entangled(seed), list[int]()
    while len(opened) < 6:
        left = [head for head in range(6) if head not in opened]
        opened.insert(0, min(left, key=lambda head: cost(losses, [other for other in left if other != head])))
    assert searched("selection", losses).all == opened


def test_the_two_differ() -> None:
    assert any(searched("elimination", entangled(s)).all != searched("selection", entangled(s)).all for s in range(8))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("at_once", [2, 4])
def test_several_heads_a_round_are_the_cheapest_by_themselves(seed: int, at_once: int) -> None:
    losses, expected, opened = entangled(seed), list[int](), list[int]()
    while left := [head for head in range(6) if head not in expected]:
        expected += sorted(left, key=lambda head: cost(losses, [*expected, head]))[:at_once]
    while left := [head for head in range(6) if head not in opened]:
        by_gain = sorted(left, key=lambda head: -cost(losses, [o for o in left if o != head]))
        opened[:0] = by_gain[-at_once:]
    assert searched("elimination", losses, at_once=at_once).all == expected
    assert searched("selection", losses, at_once=at_once).all == opened


def test_how_many_masks_are_tried() -> None:
    for strategy in STRATEGIES:
        for at_once, expected in ((1, [6, 5, 4, 3, 2]), (2, [6, 4, 2]), (4, [6, 2]), (5, [6])):
            tried: list[int] = []

            def losses(masks: Tensor, tried: list[int] = tried) -> Tensor:
                tried.append(len(masks))
                return additive(masks)

            searched(strategy, losses, at_once=at_once)
            assert tried == expected, "the last head alone needs no trying"


def test_equal_costs_go_by_number() -> None:
    """As in `HeadPattern`: of two equal heads the first streams first."""
    for strategy in STRATEGIES:
        assert searched(strategy, lambda masks: torch.zeros(len(masks))).all == list(range(6))


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("shape", [(1, 1), (1, 2), (3, 1), (4, 5)])
def test_orders_are_permutations_and_scores_a_total_order(strategy: str, shape: tuple[int, int]) -> None:
    heads = shape[0] * shape[1]
    order = Order(shape)
    assert order.all == list(range(heads))

    def look(order: Order) -> None:
        assert sorted(order.all) == list(range(heads))
        scores = order.scores()
        assert scores.shape == shape
        assert len(set(scores.flatten().tolist())) == heads
        assert 0 <= scores.min() <= scores.max() <= 1
        assert scores.flatten()[order.all].diff().gt(0).all()

    look(order)
    generator = torch.Generator().manual_seed(0)
    STRATEGIES[strategy](order, lambda masks: torch.rand(len(masks), generator=generator), 2, look)
    look(order)


def test_masks() -> None:
    order = Order((2, 3))
    assert order.mask([]).all()
    assert order.mask([4, 0]).tolist() == [[False, True, True], [True, False, True]]


def test_from_scores_leaves_open_what_lies_between() -> None:
    scores = torch.tensor([[0.9, 0.1, 0.5], [0.5, 0.2, 0.7]])
    whole = [1, 4, 2, 3, 5, 0]
    order = from_scores(scores, [0.0, 1.0])
    assert (order.shape, order.first, order.open, order.last) == ((2, 3), [], whole, [])
    order = from_scores(scores, [1 / 3, 5 / 6])
    assert (order.first, order.open, order.last) == ([1, 4], [2, 3, 5], [0])
    assert order.all == whole
    assert order.scores().flatten().argsort().tolist() == whole
    order = from_scores(scores, [0.5, 0.5])
    assert (order.first, order.open, order.last) == (whole[:3], [], whole[3:])


@pytest.mark.parametrize("seed", range(4))
def test_only_heads_between_are_searched_beside_the_settled_ones(seed: int) -> None:
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
    assert order.all == expected + last
    order = from_scores(scores, [1 / 6, 5 / 6])
    select(order, watched, 1, nothing)
    opened: list[int] = []
    while len(opened) < 4:
        left = [head for head in between if head not in opened]
        streaming = [*first, *left]
        opened.insert(0, min(left, key=lambda head: cost(losses, [o for o in streaming if o != head])))
    assert order.all == first + opened + last
    everything = torch.cat(tried).flatten(1)
    assert not everything[:, 1].any(), "settled as streaming"
    assert everything[:, 0].all(), "settled as retrieval"


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_an_interrupted_search_leaves_the_order_so_far_and_can_go_on(strategy: str) -> None:
    losses, calls, saved = entangled(3), [0], list[list[int]]()

    def stops(masks: Tensor) -> Tensor:
        calls[0] += 1
        if calls[0] == 3:
            raise KeyboardInterrupt
        return losses(masks)

    order = Order((2, 3))
    with pytest.raises(KeyboardInterrupt):
        STRATEGIES[strategy](order, stops, 1, lambda order: saved.append(order.all))
    assert len(saved) == 2
    assert len(order.open) == 4
    assert order.all == saved[-1]
    undisturbed = searched(strategy, losses)
    settled = order.first if strategy == "elimination" else order.last
    expected = undisturbed.all[:2] if strategy == "elimination" else undisturbed.all[-2:]
    assert settled == expected
    by_hint = sorted(order.open, key=lambda head: order.hints[head].item())
    assert order.open == by_hint, "the rest stands in the order of the last round"
    assert len(set(order.scores().flatten().tolist())) == 6
    STRATEGIES[strategy](order, losses, 1, nothing)
    assert order.all == undisturbed.all


def naive_swap(losses: Losses, closed: list[int], most: int, width: int) -> list[int]:
    """The heads that stream in the end: pairs of the promising, the best of all while it helps."""
    for _ in range(most):
        opened = [head for head in range(6) if head not in closed]
        into = sorted(closed, key=lambda head: cost(losses, [o for o in closed if o != head]))[:width]
        out = sorted(opened, key=lambda head: cost(losses, [*closed, head]))[:width]
        tried = [[*(o for o in closed if o != mine), theirs] for mine in into for theirs in out]
        best = min(tried, key=lambda heads: cost(losses, heads))
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
    order = Order((2, 3), list(range(6)))
    values = [cost(losses, order.all[:streaming])]

    def look(order: Order) -> None:
        assert sorted(order.all) == list(range(6))
        values.append(cost(losses, order.all[:streaming]))

    swap(order, losses, streaming, most, width, look)
    assert order.swaps == len(values) - 1 <= most
    assert all(after < before for before, after in itertools.pairwise(values))
    assert sorted(order.all[:streaming]) == naive_swap(losses, list(range(streaming)), most, width)
    if not order.swaps:
        assert order.all == list(range(6))


@pytest.mark.parametrize("streaming", range(1, 6))
def test_exchanges_reach_the_optimum_where_single_ones_lead_there(streaming: int) -> None:
    start = torch.tensor(COSTS).argsort(descending=True).tolist()  # the worst order
    order = Order((2, 3), start)
    swap(order, additive, streaming, 20, 6, nothing)
    best = min(itertools.combinations(range(6), streaming), key=lambda heads: cost(additive, heads))
    assert sorted(order.all[:streaming]) == sorted(best)
    assert order.swaps == len(set(start[:streaming]) - set(best)), "no exchange is wasted"


def test_an_exchanged_head_takes_the_others_place() -> None:
    order = Order((2, 3), [2, 1, 5, 3, 0, 4])  # head 2 costs most of those that stream, head 3 least of the others
    swap(order, additive, 3, 1, 6, nothing)
    assert order.all == [3, 1, 5, 2, 0, 4]
    assert (order.first, order.last) == ([3, 1, 5], [2, 0, 4])


@pytest.mark.parametrize("streaming", [0, 6])
def test_with_nothing_on_one_side_there_is_nothing_to_exchange(streaming: int) -> None:
    order = Order((2, 3), [2, 1, 5, 3, 0, 4])
    swap(order, additive, streaming, 5, 6, nothing)
    assert (order.all, order.swaps) == ([2, 1, 5, 3, 0, 4], 0)


def test_exchanges_go_on_where_they_stopped() -> None:
    losses, start = additive, torch.tensor(COSTS).argsort(descending=True).tolist()  # all three that stream would go
    whole, parts = Order((2, 3), list(start)), Order((2, 3), list(start))
    swap(whole, losses, 3, 2, 6, nothing)
    assert whole.swaps == 2
    swap(parts, losses, 3, 1, 6, nothing)
    swap(parts, losses, 3, 2, 6, nothing)
    assert (parts.all, parts.swaps) == (whole.all, 2)
    swap(parts, losses, 3, 2, 6, nothing)
    assert (parts.all, parts.swaps) == (whole.all, 2), "as many as were asked for, however often it is gone on with"


def test_heads_that_cost_the_same_are_not_exchanged() -> None:
    order = Order((2, 3), list(range(6)))
    swap(order, lambda masks: torch.ones(len(masks)), 3, 5, 6, nothing)
    assert (order.all, order.swaps) == (list(range(6)), 0)
