"""Search over masks: heads closed or opened one after the other, and exchanged, by what that costs."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

Losses = Callable[[Tensor], Tensor]  # of masks (n, layers, KV heads): (n,)


@dataclass
class Order:
    """The heads in the order in which they stream: what a search has decided so far.

    Heads are numbered layer by layer.

    Attributes:
        shape: gated layers and KV heads.
        first: heads that stream first, in this order.
        last: heads that stream last, in this order: the last of them is the last to stream.
        hints: (heads,) what to order the rest by, ascending, should the search end here.
        swaps: how many heads have been exchanged.
    """

    shape: tuple[int, int]
    first: list[int] = field(default_factory=list)
    last: list[int] = field(default_factory=list)
    hints: Tensor = field(default_factory=lambda: torch.empty(0))
    swaps: int = 0

    def __post_init__(self) -> None:
        """Begin with no hints."""
        if not len(self.hints):
            self.hints = torch.zeros(self.shape[0] * self.shape[1])

    @property
    def open(self) -> list[int]:
        """Heads that are not decided about, in the order of the hints."""
        decided = {*self.first, *self.last}
        return [head for head in self.hints.argsort(stable=True).tolist() if head not in decided]

    @property
    def all(self) -> list[int]:
        """All heads, the first to stream first."""
        return [*self.first, *self.open, *self.last]

    def scores(self) -> Tensor:
        """(layers, KV heads) in [0, 1]: a head's place in the order."""
        ranks = torch.empty(len(self.hints))
        ranks[self.all] = torch.linspace(0, 1, len(self.hints))
        return ranks.view(self.shape)

    def mask(self, streaming: Sequence[int]) -> Tensor:
        """(layers, KV heads) bool: False for the heads that stream."""
        retrieval = torch.ones(len(self.hints), dtype=torch.bool)
        retrieval[list(streaming)] = False
        return retrieval.view(self.shape)


def from_scores(scores: Tensor, between: Sequence[float]) -> Order:
    """An order that a pattern has settled but for the heads between two sparsities.

    Args:
        scores: (layers, KV heads) of the pattern, gated layers alone.
        between: two fractions of the heads.
    """
    ranked = scores.flatten().argsort(stable=True).tolist()
    low, high = (round(fraction * len(ranked)) for fraction in between)
    hints = torch.empty(len(ranked))
    hints[ranked] = torch.linspace(0, 1, len(ranked))
    layers, heads = scores.shape
    return Order((layers, heads), ranked[:low], ranked[high:], hints)


def eliminate(order: Order, losses: Losses, heads_per_round: int, decided: Callable[[Order], None]) -> None:
    """Greedy elimination: in each round the heads that cost least by streaming, beside those that do already, follow.

    Args:
        order: is filled from the front.
        losses: of masks.
        heads_per_round: how many follow in a round.
        decided: called after each round.
    """
    while open_heads := order.open:
        if len(open_heads) > 1:
            found = losses(torch.stack([order.mask([*order.first, head]) for head in open_heads]))
            order.hints[open_heads] = found
        order.first += order.open[:heads_per_round]
        decided(order)


def select(order: Order, losses: Losses, heads_per_round: int, decided: Callable[[Order], None]) -> None:
    """Forward selection: from all heads streaming on, those that gain most by seeing all are opened.

    Args:
        order: is filled from the back.
        losses: of masks.
        heads_per_round: how many are opened in a round.
        decided: called after each round.
    """
    while open_heads := order.open:
        if len(open_heads) > 1:
            streaming = [*order.first, *open_heads]
            masks = [order.mask([other for other in streaming if other != head]) for head in open_heads]
            order.hints[open_heads] = -losses(torch.stack(masks))
        order.last[:0] = order.open[-heads_per_round:]
        decided(order)


def swap(order: Order, losses: Losses, streaming: int, most: int, width: int, decided: Callable[[Order], None]) -> None:
    """Exchange heads across a budget for as long as that helps.

    In each round the `width` streaming heads that would gain most by seeing all are tried with the `width` others that
    would cost least by streaming; the best pair changes places.

    Args:
        order: of all heads; changed in place.
        losses: of masks.
        streaming: how many heads stream.
        most: exchanges at most, those that the order already counts among them.
        width: see above.
        decided: called after each exchange.
    """
    ranked = order.all
    closed, opened = ranked[:streaming], ranked[streaming:]
    if not closed or not opened or order.swaps >= most:
        return
    best = float(losses(order.mask(closed)[None]))
    while order.swaps < most:
        without = losses(torch.stack([order.mask([other for other in closed if other != head]) for head in closed]))
        added = losses(torch.stack([order.mask([*closed, head]) for head in opened]))
        into = [closed[place] for place in without.argsort(stable=True)[:width].tolist()]
        out = [opened[place] for place in added.argsort(stable=True)[:width].tolist()]
        pairs = [(mine, theirs) for mine in into for theirs in out]
        masks = [order.mask([theirs, *(head for head in closed if head != mine)]) for mine, theirs in pairs]
        found = losses(torch.stack(masks))
        if float(found.min()) >= best:
            return
        best = float(found.min())
        mine, theirs = pairs[int(found.argmin())]
        closed[closed.index(mine)], opened[opened.index(theirs)] = theirs, mine
        order.first, order.last, order.swaps = closed, opened, order.swaps + 1
        decided(order)


STRATEGIES = {"elimination": eliminate, "selection": select}
