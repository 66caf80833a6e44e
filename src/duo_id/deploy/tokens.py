"""How many tokens a cache holds, sample by sample: one count for all its layers."""

import copy
from typing import Any

import torch
from torch import Tensor

from duo_id.errors import UserError


class Tokens:
    """How many tokens each sample of a cache holds; all its layers share one.

    Attributes:
        seen: tokens that went in, padding among them; a tensor () on the device if `static`.
        lengths: (batch,) int64 on the device, real tokens, those of the running forward among them.
        reach: (batch,) int64 on the device, of a single token: up to which token it sees. Padding reaches as far as a
            real token would, and leaves its slot to the next.
        past: real tokens of each sample before the running forward, where the host knows them.
        spans: of each sample the first and the last but one of the chunk's tokens that are real.
        exact: whether `past` and `spans` are certain. A GPU's mask is not looked at for a single token, and after that
            they are upper bounds.
        peaks: the most real tokens that each sample has had.
        trailing: whether padding came after a sample's real tokens.
        running: whether a forward has begun and not ended.
        mask: (batch, at least the new tokens), 0 for padding, of the forward that begins; None if all are real.
    """

    def __init__(self, static: bool) -> None:
        self.static = static
        self.seen: Any = 0
        self.lengths: Tensor | None = None
        self.reach: Tensor | None = None
        self.exact = True
        self.past: list[int] = []
        self.spans: list[tuple[int, int]] = []
        self.peaks: list[int] = []
        self.mask: Tensor | None = None
        self.trailing = self.running = False

    def start(self, batch: int, device: torch.device) -> None:
        """Begin empty."""
        self.lengths = torch.zeros(batch, dtype=torch.int64, device=device)
        self.past, self.spans, self.peaks = [0] * batch, [(0, 0)] * batch, [0] * batch
        self.seen = torch.zeros((), dtype=torch.int64, device=device) if self.static else 0
        if self.static and not torch.compiler.is_compiling():
            for tensor in (self.lengths, self.seen):
                torch._dynamo.mark_static_address(tensor)

    def reset(self) -> None:
        """Be empty again; static counts keep their addresses."""
        self.trailing = self.running = False
        if self.lengths is None:
            return
        batch = len(self.lengths)
        self.past, self.spans, self.peaks, self.exact = [0] * batch, [(0, 0)] * batch, [0] * batch, True
        if self.static:
            self.lengths.zero_()
            self.seen.zero_()
        else:
            self.lengths, self.seen = None, 0

    @property
    def held(self) -> list[int]:
        """Real tokens of each sample; where the host is not certain, as of a static cache, it waits for the device."""
        if self.static or not self.exact:
            assert self.lengths is not None
            return [int(length) for length in self.lengths.tolist()]
        return self.counted

    @property
    def counted(self) -> list[int]:
        """Real tokens of each sample as the host counts them: upper bounds unless `exact`."""
        return [past + end - start for past, (start, end) in zip(self.past, self.spans, strict=True)]

    @property
    def most(self) -> int:
        """At least as many as the longest sample has, the running forward's among them; the host knows it."""
        return max(past + max(1, end - start) for past, (start, end) in zip(self.past, self.spans, strict=True))

    def advance(self, tokens: int, capacity: int | None) -> None:
        """Count the tokens of a forward that begins.

        Args:
            tokens: new tokens of each sample.
            capacity: most tokens of a sample; None for no limit.

        Raises:
            UserError: there is no room; nothing has been changed. Inside a compiled or captured step the device alone
                knows, and there a token without room is not stored.
        """
        assert self.lengths is not None
        blind = self.static and tokens == 1 and _blind(self.lengths)
        given, mask = self.mask, None
        if given is not None:
            start = given.shape[1] - tokens
            start = start if blind else min(start, int(self.seen))  # a mask may go on beyond the text
            mask = given[:, max(0, start) :][:, :tokens]
            if mask.shape != (len(self.lengths), tokens):
                raise UserError(
                    f"attention_mask is {tuple(given.shape)} for {len(self.lengths)} samples and {tokens} new tokens: "
                    "give (batch, tokens so far)"
                )
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

    def _count(self, tokens: int, mask: Tensor | None, capacity: int | None) -> None:
        """Count on the host."""
        unseen = tokens == 1 and mask is not None and mask.is_cuda  # so as not to wait for it in each decode step
        held = self.counted if unseen and not self.static else self.held
        spans = [(0, tokens)] * len(held) if mask is None or unseen else _spans(mask)
        most = max(past + max(1, end - start) for past, (start, end) in zip(held, spans, strict=True))
        if capacity is not None and most > capacity:
            raise UserError(
                f"the static cache holds {capacity} tokens and would need {most}: give it a larger max_length"
            )
        ends = zip(held, spans, strict=True)
        self.trailing |= any(end < tokens and past + end - start > 0 for past, (start, end) in ends)
        self.past, self.spans = held, spans
        self.exact = not unseen and (self.exact or self.static or tokens > 1)

    @property
    def uniform(self) -> bool:
        """Whether all samples have the same past and the same real tokens in the running forward."""
        return len(set(self.past)) == 1 and len(set(self.spans)) == 1

    def fork(self, samples: Tensor) -> "Tokens":
        """The counts of the samples `samples[i]`; these stay as they are."""
        twin = copy.copy(self)
        if self.lengths is not None:
            twin.lengths = self.lengths.clone()
            twin.select(samples)
        return twin

    def select(self, samples: Tensor) -> None:
        """Make sample `samples[i]` the new sample i."""
        if self.lengths is None:
            return
        chosen = self.lengths.index_select(0, samples.to(self.lengths.device))
        if len(chosen) == len(self.lengths):
            self.lengths.copy_(chosen)  # at the old address, which a compiled or captured step may know
        else:
            self.lengths = chosen
        if self.static or not self.exact or len({*zip(self.past, self.spans, self.peaks, strict=True)}) > 1:
            order = samples.tolist()
        else:
            order = [0] * len(samples)
        self.past, self.spans, self.peaks = ([x[i] for i in order] for x in (self.past, self.spans, self.peaks))


def _blind(tensor: Tensor) -> bool:
    """Whether the host cannot look at a value now: while a step is compiled or captured."""
    return torch.compiler.is_compiling() or (tensor.is_cuda and torch.cuda.is_current_stream_capturing())


def _spans(mask: Tensor) -> list[tuple[int, int]]:
    """The first and the last but one real token of each row of (batch, tokens); (0, 0) if there is none."""
    mask = mask.bool()
    count, first = mask.sum(-1).tolist(), mask.to(torch.int32).argmax(-1).tolist()
    return [(start, start + number) if number else (0, 0) for start, number in zip(first, count, strict=True)]
