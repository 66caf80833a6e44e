"""How many tokens a cache holds, sample by sample: one count for all its layers."""

from typing import Any

import torch
from torch import Tensor

from duo_id.errors import UserError


class Tokens:
    """How many tokens each sample of a cache holds; all its layers share one.

    Attributes:
        seen: tokens that went in, padding among them; a tensor () on the device if `static`.
        lengths: (batch,) int64 on the device, real tokens, those of the running forward among them.
        past: real tokens of each sample before the running forward, where the host knows them.
        spans: of each sample the first and the last but one of the chunk's tokens that are real.
        peaks: the most real tokens that each sample has had.
        mask: (batch, at least the new tokens), 0 for padding, of the forward that begins; None if all are real. It is
            not looked at for a single token.
    """

    def __init__(self, static: bool) -> None:
        self.static = static
        self.seen: Any = 0
        self.lengths: Tensor | None = None
        self.past: list[int] = []
        self.spans: list[tuple[int, int]] = []
        self.peaks: list[int] = []
        self.mask: Tensor | None = None

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
        if self.lengths is None:
            return
        batch = len(self.lengths)
        self.past, self.spans, self.peaks = [0] * batch, [(0, 0)] * batch, [0] * batch
        if self.static:
            self.lengths.zero_()
            self.seen.zero_()
        else:
            self.lengths, self.seen = None, 0

    @property
    def held(self) -> list[int]:
        """Real tokens of each sample; of a static cache this waits for the device."""
        if self.static:
            assert self.lengths is not None
            return [int(length) for length in self.lengths.tolist()]
        return [past + end - start for past, (start, end) in zip(self.past, self.spans, strict=True)]

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
        batch, single, mask = len(self.lengths), tokens == 1, self.mask
        if not (self.static and single and _blind(self.lengths)):
            held = self.held
            spans = [(0, tokens)] * batch if mask is None or single else _spans(mask[:, -tokens:])
            most = max(past + end - start for past, (start, end) in zip(held, spans, strict=True))
            if capacity is not None and most > capacity:
                raise UserError(
                    f"the static cache holds {capacity} tokens and would need {most}: give it a larger max_length"
                )
            self.past, self.spans = held, spans
        if single or mask is None:
            self.lengths.add_(tokens)
        else:
            counts = [end - start for start, end in self.spans]
            self.lengths.add_(torch.tensor(counts, device=self.lengths.device))
        if self.static:
            self.seen.add_(tokens)
        else:
            self.seen += tokens

    @property
    def uniform(self) -> bool:
        """Whether all samples have the same past and the same real tokens in the running forward."""
        return len(set(self.past)) == 1 and len(set(self.spans)) == 1

    def select(self, samples: Tensor) -> None:
        """Make sample `samples[i]` the new sample i."""
        if self.lengths is None:
            return
        self.lengths = self.lengths.index_select(0, samples.to(self.lengths.device))
        if self.static or len({*zip(self.past, self.spans, self.peaks, strict=True)}) > 1:
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
