"""Search over masks: heads are closed or opened one after the other, and exchanged, by the loss that results."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

Losses = Callable[[Tensor], Tensor]  # maps masks (n, layers, KV heads) to (n,)


@dataclass
class HeadOrder:
    """The order in which heads become streaming heads, as far as a search has decided it.

    Heads are numbered layer by layer.

    Attributes:
        shape: gated layers and KV heads.
        stream_first: decided heads that stream before all others, in this order.
        stream_last: decided heads that stream after all others, in this order.
        estimates: (heads,) provisional cost of streaming, which orders the undecided heads.
        swaps: number of exchanges so far.
    """

    shape: tuple[int, int]
    stream_first: list[int] = field(default_factory=list)
    stream_last: list[int] = field(default_factory=list)
    estimates: Tensor = field(default_factory=lambda: torch.empty(0))
    swaps: int = 0

    def __post_init__(self) -> None:
        """Start with equal estimates."""
        if not len(self.estimates):
            self.estimates = torch.zeros(self.shape[0] * self.shape[1])

    @property
    def undecided(self) -> list[int]:
        """Undecided heads, in ascending order of their estimates."""
        decided = {*self.stream_first, *self.stream_last}
        return [head for head in self.estimates.argsort(stable=True).tolist() if head not in decided]

    @property
    def ranking(self) -> list[int]:
        """All heads in the order in which they stream."""
        return [*self.stream_first, *self.undecided, *self.stream_last]

    def scores(self) -> Tensor:
        """(layers, KV heads) in [0, 1]: the heads' ranks in the order."""
        ranks = torch.empty(len(self.estimates))
        ranks[self.ranking] = torch.linspace(0, 1, len(self.estimates))
        return ranks.view(self.shape)

    def mask(self, streaming: Sequence[int]) -> Tensor:
        """(layers, KV heads) bool: False for the streaming heads."""
        retrieval = torch.ones(len(self.estimates), dtype=torch.bool)
        retrieval[list(streaming)] = False
        return retrieval.view(self.shape)


def from_scores(scores: Tensor, between: Sequence[float]) -> HeadOrder:
    """The order of a pattern's scores, with the heads between two sparsities left undecided.

    Args:
        scores: (layers, KV heads) of the pattern's gated layers.
        between: two fractions of the heads.
    """
    ranked = scores.flatten().argsort(stable=True).tolist()
    low, high = (round(fraction * len(ranked)) for fraction in between)
    estimates = torch.empty(len(ranked))
    estimates[ranked] = torch.linspace(0, 1, len(ranked))
    layers, heads = scores.shape
    return HeadOrder((layers, heads), ranked[:low], ranked[high:], estimates)


def eliminate(order: HeadOrder, losses: Losses, heads_per_round: int, on_decision: Callable[[HeadOrder], None]) -> None:
    """Greedy elimination: each round closes the heads whose streaming costs least, on top of those already closed.

    Args:
        order: filled from the front, in place.
        losses: of masks.
        heads_per_round: heads closed per round.
        on_decision: called after each round.
    """
    while undecided := order.undecided:
        if len(undecided) > 1:
            costs = losses(torch.stack([order.mask([*order.stream_first, head]) for head in undecided]))
            order.estimates[undecided] = costs
        order.stream_first += order.undecided[:heads_per_round]
        on_decision(order)


def select(order: HeadOrder, losses: Losses, heads_per_round: int, on_decision: Callable[[HeadOrder], None]) -> None:
    """Forward selection: starting with all heads streaming, each round opens those that gain most from full attention.

    Args:
        order: filled from the back, in place.
        losses: of masks.
        heads_per_round: heads opened per round.
        on_decision: called after each round.
    """
    while undecided := order.undecided:
        if len(undecided) > 1:
            streaming = [*order.stream_first, *undecided]
            masks = [order.mask([other for other in streaming if other != head]) for head in undecided]
            order.estimates[undecided] = -losses(torch.stack(masks))
        order.stream_last[:0] = order.undecided[-heads_per_round:]
        on_decision(order)


def swap(
    order: HeadOrder,
    losses: Losses,
    streaming: int,
    max_swaps: int,
    width: int,
    on_decision: Callable[[HeadOrder], None],
) -> None:
    """Exchange heads across a budget for as long as that lowers the loss.

    Each round tries the `width` streaming heads that would gain most from full attention against the `width` others
    whose streaming would cost least; the best pair is exchanged.

    Args:
        order: of all heads; changed in place.
        losses: of masks.
        streaming: number of streaming heads.
        max_swaps: limit on exchanges, including those that the order already counts.
        width: see above.
        on_decision: called after each exchange.
    """
    ranked = order.ranking
    closed, opened = ranked[:streaming], ranked[streaming:]
    if not closed or not opened or order.swaps >= max_swaps:
        return
    lowest = float(losses(order.mask(closed)[None]))
    while order.swaps < max_swaps:
        losses_opened = losses(
            torch.stack([order.mask([other for other in closed if other != head]) for head in closed])
        )
        losses_closed = losses(torch.stack([order.mask([*closed, head]) for head in opened]))
        to_open = [closed[index] for index in losses_opened.argsort(stable=True)[:width].tolist()]
        to_close = [opened[index] for index in losses_closed.argsort(stable=True)[:width].tolist()]
        pairs = [(opening, closing) for opening in to_open for closing in to_close]
        masks = [order.mask([closing, *(head for head in closed if head != opening)]) for opening, closing in pairs]
        pair_losses = losses(torch.stack(masks))
        if float(pair_losses.min()) >= lowest:
            return
        lowest = float(pair_losses.min())
        opening, closing = pairs[int(pair_losses.argmin())]
        closed[closed.index(opening)], opened[opened.index(closing)] = closing, opening
        order.stream_first, order.stream_last, order.swaps = closed, opened, order.swaps + 1
        on_decision(order)


STRATEGIES = {"elimination": eliminate, "selection": select}
