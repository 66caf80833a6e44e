"""How many tokens a cache holds, sample by sample: one count for all its layers."""

import copy
from typing import Any, cast

import torch
from torch import Tensor

from duo_id.attention.padding import real_first
from duo_id.common.errors import UserError

Place = slice | Tensor  # where a sample's real tokens lie in a chunk: a run of them, or (n,) int64 on the CPU


class Tokens:
    """How many tokens each sample of a cache holds; all its layers share one.

    A column is what all samples get at once, a real token or padding, as in the attention mask.

    Attributes:
        seen: columns that went in; a tensor () on the device if `static`.
        lengths: (batch,) int64 on the device, real tokens, those of the running forward among them.
        reach: (batch,) int64 on the device, of a single token: up to which token it sees. Padding reaches as far as a
            real token would, and leaves its slot to the next.
        past: real tokens of each sample before the running forward, where the host knows them.
        new: real tokens of each sample in the running forward, where the host knows them.
        places: where these lie in the chunk.
        real: (batch, columns) bool on the CPU, which columns hold real tokens; None: all of them. Columns that came in
            compiled or captured steps, of which the host knows nothing, are not there.
        peaks: the most real tokens that each sample has had.
        recorded: tokens that streaming heads keep beyond their window, for `DualCache.crop`; 0: none.
        since: the real tokens that each sample had when this began.
        fresh: whether the running forward is known to be the first.
        announced: whether a forward of the model has said that it begins, and with which mask.
        running: whether a forward has begun and not ended.
        mask: (batch, at least the new tokens), 0 for padding, of the forward that begins; None if all are real.
    """

    def __init__(self, static: bool) -> None:
        self.static = static
        self.seen: Any = 0
        self.lengths: Tensor | None = None
        self.reach: Tensor | None = None
        self.past: list[int] = []
        self.new: list[int] = []
        self.places: list[Place] = []
        self.real: Tensor | None = None
        self.peaks: list[int] = []
        self.recorded = 0
        self.since: list[int] = []
        self.mask: Tensor | None = None
        self.running = self.fresh = self.announced = False
        self._order: Tensor | None = None

    def start(self, batch: int, device: torch.device) -> None:
        """Begin empty."""
        self.lengths = torch.zeros(batch, dtype=torch.int64, device=device)
        self._forget(batch)
        self.seen = torch.zeros((), dtype=torch.int64, device=device) if self.static else 0
        if self.static and not torch.compiler.is_compiling():
            for tensor in (self.lengths, self.seen):
                torch._dynamo.mark_static_address(tensor)

    def reset(self) -> None:
        """Be empty again; static counts keep their addresses."""
        self.running = False
        if self.lengths is None:
            return
        self._forget(len(self.lengths))
        if self.static:
            self.lengths.zero_()
            self.seen.zero_()
        else:
            self.lengths, self.seen = None, 0

    def _forget(self, batch: int) -> None:
        self.past, self.new, self.peaks, self.since = ([0] * batch for _ in range(4))
        self.places, self.real = [slice(0, 0)] * batch, None

    @property
    def held(self) -> list[int]:
        """Real tokens of each sample; of a static cache, which may have run captured steps, the device knows them."""
        if self.static:
            assert self.lengths is not None
            return [int(length) for length in self.lengths.tolist()]
        return [past + new for past, new in zip(self.past, self.new, strict=True)]

    @property
    def most(self) -> int:
        """At least as many as the longest sample has, the running forward's among them; the host knows it."""
        return max(past + max(1, new) for past, new in zip(self.past, self.new, strict=True))

    @property
    def uniform(self) -> bool:
        """Whether all samples have the same past and the same real tokens, in one run, in the running forward."""
        if any(isinstance(place, Tensor) for place in self.places):
            return False
        runs = {(place.start, place.stop) for place in self.places if isinstance(place, slice)}
        return len(set(self.past)) == 1 and len(runs) == 1

    def order(self, device: torch.device) -> Tensor:
        """The order (batch, tokens) that puts the real tokens of a padded chunk first."""
        assert self._order is not None
        self._order = self._order.to(device)
        return self._order

    def advance(self, tokens: int, capacity: int | None) -> None:
        """Count the tokens of a forward that begins.

        Args:
            tokens: new tokens of each sample.
            capacity: most tokens of a sample; None for no limit.

        Raises:
            UserError: there is no room, or the mask hides a token that is in the cache or shows padding as one; nothing
                has been changed. Inside a compiled or captured step the device alone knows: there a token without room
                is not stored, and the mask of the past is not looked at.
        """
        assert self.lengths is not None
        mask, blind = None, self.static and tokens == 1 and _blind(self.lengths)
        if self.mask is not None:
            mask = self.mask[:, -tokens:] if blind else self._new_columns(self.mask, tokens)
        self.fresh = not blind and int(self.seen) == 0
        if not blind:
            self._count(tokens, mask, capacity)
        self.running = True
        if mask is None:
            self.lengths.add_(tokens)
            self.reach = self.lengths
        else:
            self.reach = self.lengths + 1
            self.lengths.add_(mask.to(self.lengths).sum(-1))
        if self.static:
            self.seen.add_(tokens)
        else:
            self.seen += tokens

    def check_past(self, mask: Tensor) -> None:
        """Raise a `UserError` unless (batch, columns) shows all tokens that are in the cache, and no padding there."""
        if self.lengths is not None:
            self._check_past(mask[:, : int(self.seen)], int(self.seen))

    def _new_columns(self, given: Tensor, tokens: int) -> Tensor:
        """The part (batch, tokens) of a mask for the new tokens; the part before them is checked."""
        assert self.lengths is not None
        seen = int(self.seen)
        start = min(given.shape[1] - tokens, seen)  # a mask may go on beyond the text
        if start < 0 or len(given) != len(self.lengths):
            raise UserError(
                f"attention_mask is {tuple(given.shape)} for {len(self.lengths)} samples and {tokens} new tokens: "
                "give (batch, tokens so far)"
            )
        given = given.bool().cpu()
        self._check_past(given[:, :start], seen)
        return given[:, start : start + tokens]

    def _check_past(self, past: Tensor, seen: int) -> None:
        """Raise unless a mask (batch, n) of the last n of `seen` columns is what the cache was given."""
        assert self.lengths is not None
        past, first, held = past.bool().cpu(), seen - past.shape[1], self.held
        if self.real is None:
            wrong = held == [seen] * len(held) and not past.all()
        else:
            known = self.real[:, first:]
            wrong = not torch.equal(past[:, : known.shape[1]], known)
        if first == 0 and past.shape[1]:  # what captured steps brought is known by its number alone
            wrong = wrong or past.sum(-1).tolist() != held
        if wrong:
            raise UserError(
                "attention_mask hides tokens that are in the cache, or shows padding as tokens: a dual cache cannot "
                "forget single tokens, so give the mask that they came with, or begin again with a new cache"
            )

    def _count(self, tokens: int, mask: Tensor | None, capacity: int | None) -> None:
        """Count on the host; `mask` (batch, tokens) lies there."""
        held = self.held
        new, places = [tokens] * len(held), cast(list[Place], [slice(0, tokens)] * len(held))
        if mask is not None and not mask.all():
            new, places = mask.sum(-1).tolist(), [_place(row) for row in mask]
        most = max(past + max(1, count) for past, count in zip(held, new, strict=True))
        if capacity is not None and most > capacity:
            raise UserError(
                f"the static cache holds {capacity} tokens and would need {most}: give it a larger max_length"
            )
        if self.real is not None or new != [tokens] * len(held):
            self.real = torch.cat([self._columns(), torch.ones(len(held), tokens).bool() if mask is None else mask], 1)
        self.past, self.new, self.places = held, new, places
        self._order = None if mask is None else real_first(mask)

    def _columns(self) -> Tensor:
        """`real`, as long as `seen`: columns of captured steps count as tokens, which is what such steps bring."""
        assert self.lengths is not None
        known = self.real if self.real is not None else torch.ones(len(self.lengths), 0, dtype=torch.bool)
        return torch.cat([known, known.new_ones(len(known), int(self.seen) - known.shape[1])], 1)

    def removed(self, columns: int) -> list[int]:
        """How many real tokens of each sample lie in the latest so many columns."""
        assert self.lengths is not None
        if self.real is None:
            return [columns] * len(self.lengths)
        return [int(count) for count in self._columns()[:, int(self.seen) - columns :].sum(-1)]

    def remove(self, columns: int) -> None:
        """Take the latest columns of all samples away."""
        assert self.lengths is not None
        held, gone, self.peaks = self.held, self.removed(columns), self.highest
        if self.real is not None:
            self.real = self._columns()[:, : int(self.seen) - columns]
        self.past = [length - count for length, count in zip(held, gone, strict=True)]
        self.new, self.places = [0] * len(held), [slice(0, 0) for _ in held]
        self.lengths.sub_(torch.tensor(gone, device=self.lengths.device))
        self.seen -= columns

    @property
    def highest(self) -> list[int]:
        """The most real tokens that each sample has had, those of now among them."""
        return [max(pair) for pair in zip(self.held, self.peaks, strict=True)]

    @property
    def floors(self) -> list[int]:
        """The least length to which each sample can go back where its text is longer than a window.

        The next token does not see the oldest of the window before it, so one token more than what is recorded.
        """
        since = self.since if self.recorded else self.highest
        return [max(peak - self.recorded, start) - 1 for peak, start in zip(self.highest, since, strict=True)]

    @torch.inference_mode(False)
    def fork(self, samples: Tensor) -> "Tokens":
        """The counts of the samples `samples[i]`; these stay as they are."""
        twin = copy.copy(self)
        if self.lengths is not None:
            twin.lengths = self.lengths.clone()
            twin.select(samples)
        return twin

    @torch.inference_mode(False)
    def select(self, samples: Tensor) -> None:
        """Make sample `samples[i]` the new sample i."""
        if self.lengths is None:
            return
        chosen = self.lengths.index_select(0, samples.to(self.lengths.device))
        if len(chosen) == len(self.lengths):
            self.lengths.copy_(chosen)  # at the old address, which a compiled or captured step may know
        else:
            self.lengths = chosen
        counts = {*zip(self.past, self.new, self.peaks, self.since, strict=True)}
        order = [0] * len(samples)  # if all are alike, the device need not be waited for
        if self.static or self.real is not None or len(counts) > 1:
            order = samples.tolist()
        for name in ("past", "new", "places", "peaks", "since"):
            setattr(self, name, [getattr(self, name)[i] for i in order])
        if self.real is not None:
            self.real = self.real[order]


def _blind(tensor: Tensor) -> bool:
    """Whether the host cannot look at a value now: while a step is compiled or captured."""
    return torch.compiler.is_compiling() or (tensor.is_cuda and torch.cuda.is_current_stream_capturing())


def _place(row: Tensor) -> Place:
    """Where the real tokens of (tokens,) lie: a slice if they are in one piece."""
    found = row.nonzero()[:, 0]
    if not len(found):
        return slice(0, 0)
    start, end = int(found[0]), int(found[-1]) + 1
    return slice(start, end) if end - start == len(found) else found
