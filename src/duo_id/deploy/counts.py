"""How many tokens a cache holds, sample by sample: one count, shared by all its layers."""

import copy
from typing import Any, cast

import torch
from torch import Tensor

from duo_id.attention.padding import real_first
from duo_id.common.errors import UserError

Places = slice | Tensor  # a sample's real tokens in a chunk: a slice, or indices (n,) int64 on the CPU


class Tokens:
    """How many tokens each sample of a cache holds; all its layers share one.

    A column, as in the attention mask, is one position in all samples at once, each a real token or padding.

    Attributes:
        seen: number of columns so far; a tensor () on the device if `static`.
        lengths: (batch,) int64 on the device, real tokens, including those of the running forward.
        reach: (batch,) int64 on the device, in a decode step: the number of tokens that the new one sees. Padding sees
            as many as a real token would, and leaves its slot to the next token.
        past: real tokens of each sample before the running forward, as far as the host knows.
        new: real tokens of each sample in the running forward, as far as the host knows.
        places: where the new tokens are in the chunk, for each sample.
        real: (batch, columns) bool on the CPU, which columns hold real tokens; None: all of them. Columns of compiled
            or captured steps are missing, because the host does not know them.
        peaks: the largest number of real tokens that each sample has had.
        recorded: tokens that streaming heads keep beyond their window, for `DualCache.crop`; 0: none.
        evicted: real tokens that each sample had when some of them were last evicted; 0: never.
        since: the number of real tokens that each sample had when recording began.
        fresh: whether the running forward is known to be the first.
        announced: whether a forward of the whole model has started, which sets `mask`.
        running: whether a forward has started and not finished.
        mask: (batch, at least the new tokens), 0 for padding, of the starting forward; None if all tokens are real.
    """

    def __init__(self, static: bool) -> None:
        self.static = static
        self.seen: Any = 0
        self.lengths: Tensor | None = None
        self.reach: Tensor | None = None
        self.past: list[int] = []
        self.new: list[int] = []
        self.places: list[Places] = []
        self.real: Tensor | None = None
        self.peaks: list[int] = []
        self.recorded = self.evicted = 0
        self.since: list[int] = []
        self.mask: Tensor | None = None
        self.running = self.fresh = self.announced = False
        self._order: Tensor | None = None

    def start(self, batch: int, device: torch.device) -> None:
        """Start empty."""
        self.lengths = torch.zeros(batch, dtype=torch.int64, device=device)
        self._forget(batch)
        self.seen = torch.zeros((), dtype=torch.int64, device=device) if self.static else 0
        if self.static:
            self._pin()

    def _pin(self) -> None:
        """Tell the compiler that static counts stay where they are."""
        if not torch.compiler.is_compiling():
            for tensor in (self.lengths, self.seen):
                torch._dynamo.mark_static_address(tensor)

    def reset(self) -> None:
        """Become empty again; static counts keep their addresses."""
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
        self.places, self.real, self.evicted = [slice(0, 0)] * batch, None, 0

    @property
    def held(self) -> list[int]:
        """Real tokens of each sample; read from the device for a static cache, which may have run captured steps."""
        if self.static:
            assert self.lengths is not None
            return [int(length) for length in self.lengths.tolist()]
        return [past + new for past, new in zip(self.past, self.new, strict=True)]

    @property
    def most(self) -> int:
        """An upper bound on the longest sample, including the running forward; known to the host."""
        return max(past + max(1, new) for past, new in zip(self.past, self.new, strict=True))

    @property
    def uniform(self) -> bool:
        """Whether all samples have the same past and the same contiguous run of real tokens in the running forward."""
        if any(isinstance(real, Tensor) for real in self.places):
            return False
        runs = {(real.start, real.stop) for real in self.places if isinstance(real, slice)}
        return len(set(self.past)) == 1 and len(runs) == 1

    @property
    def parts(self) -> list[tuple[slice, int, Places]]:
        """Samples, their past and where their new tokens are; all samples at once if they are alike."""
        everyone = [slice(None)] if self.uniform else [slice(i, i + 1) for i in range(len(self.past))]
        return list(zip(everyone, self.past, self.places, strict=False))

    def order(self, device: torch.device) -> Tensor:
        """The order (batch, tokens) that puts the real tokens of a padded chunk first."""
        assert self._order is not None
        self._order = self._order.to(device)
        return self._order

    def advance(self, tokens: int, capacity: int | None) -> None:
        """Count the tokens of a forward that starts.

        Args:
            tokens: new tokens of each sample.
            capacity: maximum number of tokens of a sample; None for no limit.

        Raises:
            UserError: there is no room, or the mask hides a cached token or exposes padding; nothing is changed. Inside
                a compiled or captured step only the device knows: there, a token without room is not stored, and the
                mask of the past is not checked.
        """
        assert self.lengths is not None
        mask, blind = None, self.static and tokens == 1 and _host_blind(self.lengths)
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
        """Raise a `UserError` unless the mask (batch, columns) shows all cached tokens, and no cached padding."""
        if self.lengths is not None:
            self._check_past(mask[:, : int(self.seen)], int(self.seen))

    def _new_columns(self, mask: Tensor, tokens: int) -> Tensor:
        """The part (batch, tokens) of a mask for the new tokens; checks the part before them."""
        assert self.lengths is not None
        seen = int(self.seen)
        start = min(mask.shape[1] - tokens, seen)  # a mask may be longer than the text
        if start < 0 or len(mask) != len(self.lengths):
            raise UserError(
                f"attention_mask has shape {tuple(mask.shape)} for {len(self.lengths)} samples and {tokens} new "
                "tokens: pass (batch, tokens so far)"
            )
        mask = mask.bool().cpu()
        self._check_past(mask[:, :start], seen)
        return mask[:, start : start + tokens]

    def _check_past(self, past: Tensor, seen: int) -> None:
        """Raise unless a mask (batch, n) of the last n of `seen` columns agrees with the cache."""
        assert self.lengths is not None
        past, first, held = past.bool().cpu(), seen - past.shape[1], self.held
        if self.real is None:
            differs = held == [seen] * len(held) and not past.all()
        else:
            recorded = self.real[:, first:]
            differs = not torch.equal(past[:, : recorded.shape[1]], recorded)
        if first == 0 and past.shape[1]:  # of captured steps, only the number of tokens is known
            differs = differs or past.sum(-1).tolist() != held
        if differs:
            raise UserError(
                "attention_mask hides cached tokens, or shows cached padding as tokens: a dual cache cannot drop "
                "single tokens, so pass the mask that they came with, or start with a new cache"
            )

    def _count(self, tokens: int, mask: Tensor | None, capacity: int | None) -> None:
        """Count on the host; `mask` (batch, tokens) is on the CPU."""
        held = self.held
        new, places = [tokens] * len(held), cast(list[Places], [slice(0, tokens)] * len(held))
        if mask is not None and not mask.all():
            new, places = mask.sum(-1).tolist(), [_places(row) for row in mask]
        most = max(past + max(1, count) for past, count in zip(held, new, strict=True))
        if capacity is not None and most > capacity:
            raise UserError(f"the static cache holds {capacity} tokens but would need {most}: use a larger max_length")
        if self.real is not None or new != [tokens] * len(held):
            self.real = torch.cat([self._columns(), torch.ones(len(held), tokens).bool() if mask is None else mask], 1)
        self.past, self.new, self.places = held, new, places
        self._order = None if mask is None else real_first(mask)

    def _columns(self) -> Tensor:
        """`real`, extended to `seen` columns: those of captured steps hold real tokens."""
        assert self.lengths is not None
        columns = self.real if self.real is not None else torch.ones(len(self.lengths), 0, dtype=torch.bool)
        return torch.cat([columns, columns.new_ones(len(columns), int(self.seen) - columns.shape[1])], 1)

    def removed(self, columns: int) -> list[int]:
        """How many real tokens of each sample are in the last `columns` columns."""
        assert self.lengths is not None
        if self.real is None:
            return [columns] * len(self.lengths)
        return [int(count) for count in self._columns()[:, int(self.seen) - columns :].sum(-1)]

    def remove(self, columns: int) -> None:
        """Remove the last columns of all samples."""
        assert self.lengths is not None
        held, removed, self.peaks = self.held, self.removed(columns), self.highest
        if self.real is not None:
            self.real = self._columns()[:, : int(self.seen) - columns]
        self.past = [length - count for length, count in zip(held, removed, strict=True)]
        self.new, self.places = [0] * len(held), [slice(0, 0) for _ in held]
        self.lengths.sub_(torch.tensor(removed, device=self.lengths.device))
        self.seen -= columns

    @property
    def highest(self) -> list[int]:
        """The largest number of real tokens that each sample has had, including the current ones."""
        return [max(pair) for pair in zip(self.held, self.peaks, strict=True)]

    @property
    def floors(self) -> list[int]:
        """The smallest length to which each sample can be cropped if its text is longer than a window.

        One token more than is recorded, because the next token does not see the oldest one of the previous window.
        """
        since = self.since if self.recorded else self.highest
        return [max(peak - self.recorded, start) - 1 for peak, start in zip(self.highest, since, strict=True)]

    @torch.inference_mode(False)
    def fork(self, samples: Tensor, static: bool = False) -> "Tokens":
        """Independent counts of the samples `samples[i]`, of a static cache or a growing one."""
        copied = copy.copy(self)
        if self.lengths is not None:
            copied.lengths = self.lengths.clone()
            if self.static:  # the host does not know of captured steps
                copied.past, copied.new, copied.seen = self.held, [0] * len(self.lengths), int(self.seen)
                copied.places = [slice(0, 0)] * len(self.lengths)
                copied.real = None if self.real is None else self._columns()
            copied.static = False
            copied.select(samples)
        copied.static = static
        if copied.lengths is not None and static:
            copied.seen = torch.tensor(copied.seen, device=copied.lengths.device)
            copied._pin()
        return copied

    def forget_interruption(self) -> None:
        """Forget a forward that was interrupted before it changed anything on the device."""
        self.running = self.announced = False

    @torch.inference_mode(False)
    def select(self, samples: Tensor) -> None:
        """Make sample `samples[i]` the new sample i."""
        if self.lengths is None:
            return
        selected = self.lengths.index_select(0, samples.to(self.lengths.device))
        if len(selected) == len(self.lengths):
            self.lengths.copy_(selected)  # in place: a compiled or captured step may hold the address
        else:
            self.lengths = selected
        counts = {*zip(self.past, self.new, self.peaks, self.since, strict=True)}
        order = [0] * len(samples)  # if all samples are alike, no need to wait for the device
        if self.static or self.real is not None or len(counts) > 1:
            order = samples.tolist()
        for name in ("past", "new", "places", "peaks", "since"):
            setattr(self, name, [getattr(self, name)[i] for i in order])
        if self.real is not None:
            self.real = self.real[order]


def _host_blind(tensor: Tensor) -> bool:
    """Whether the host cannot read a value now, because a step is being compiled or captured."""
    return torch.compiler.is_compiling() or (tensor.is_cuda and torch.cuda.is_current_stream_capturing())


def _places(row: Tensor) -> Places:
    """The positions of the real tokens of a mask row (tokens,): a slice if they are contiguous."""
    positions = row.nonzero()[:, 0]
    if not len(positions):
        return slice(0, 0)
    start, end = int(positions[0]), int(positions[-1]) + 1
    return slice(start, end) if end - start == len(positions) else positions
