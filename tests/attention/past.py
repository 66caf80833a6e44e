"""Decode steps and chunks with a known past: what the stores hold before and after, and dense attention over it."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

KV_HEADS = 5
RETRIEVAL, STREAMING = 1, 0  # in a pattern; a larger number is a head's own span
PATTERNS = {
    "mixed": [0, 1, 1, 0, 1],
    "all": [1] * 5,
    "none": [0] * 5,
    "one": [0, 0, 0, 1, 0],
    "spans": [0, 1, 40, 7, 40],
    "rings": [90, 0, 2, 300, 90],
    "long": [0, 8192, 1, 2048, 8192],
}


def slot(token: int, sink: int, recent: int) -> int:
    """Where a streaming head keeps a token: the sink in order, then a ring."""
    return token if token < sink else sink + (token - sink) % recent


@dataclass
class Past:
    """Keys and values of a few samples with `past[sample]` tokens before `new` tokens each, and their queries.

    Attributes:
        past: tokens of each sample in the stores.
        new: tokens that come.
        recent: the span of streaming heads that have none of their own.
        pattern: which KV heads are retrieval heads, and the spans of the others.
        capacity: slots of the full stores.
        dropped: tokens of each sample and retrieval head that were evicted, others for each head.
        ragged: whether each head of each sample has lost its own number of tokens instead, and heads are rows.
        most: slots of streaming heads at most, as in a store that grows; None: those of their windows.
    """

    past: list[int]
    new: int
    sink: int
    recent: int
    pattern: str = "mixed"
    group: int = 2
    dim: int = 16
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    capacity: int | None = None
    most: int | None = None
    scale: float = 0.3
    dropped: int = 0
    ragged: bool = False
    query: Tensor = field(init=False)
    key: Tensor = field(init=False)
    value: Tensor = field(init=False)

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(sum(self.past) + self.dim)
        batch, longest = len(self.past), max(self.past) + self.new

        def draw(heads: int, tokens: int) -> Tensor:
            tokens_first = torch.randn(batch, tokens, heads, self.dim, generator=generator)
            return tokens_first.to(self.device, self.dtype).transpose(1, 2)  # strides as models have them

        self.keys, self.values = draw(KV_HEADS, longest), draw(KV_HEADS, longest)
        self.query = draw(KV_HEADS * self.group, self.new)
        pieces = [[x[i, :, n : n + self.new] for i, n in enumerate(self.past)] for x in (self.keys, self.values)]
        self.key, self.value = (torch.stack([y.transpose(0, 1) for y in x]).transpose(1, 2) for x in pieces)
        kinds = dict(enumerate(PATTERNS[self.pattern]))
        self.full = [head for head, kind in kinds.items() if kind == RETRIEVAL]
        self.span = {head: kind or self.recent for head, kind in kinds.items() if kind != RETRIEVAL}
        self.streaming = sorted(self.span, key=lambda head: (-self.span[head], head))
        self.spans = [self.span[head] for head in self.streaming]
        self.slots = [min(self.sink + span, self.most or self.sink + span) for span in self.spans]
        self.first = [sum(self.slots[:i]) for i in range(len(self.slots))]
        self.retrieval = torch.tensor(self.full, dtype=torch.int32, device=self.device)
        self.listed = torch.tensor(
            [self.streaming, self.first, self.spans], dtype=torch.int32, device=self.device
        )  # fmt: skip
        self.lost = {
            (sample, head): torch.randperm(min(self.past), generator=generator)[: int(share * min(self.past))].tolist()
            for sample in range(batch)
            for head, share in zip(self.full, torch.rand(len(self.full), generator=generator).tolist(), strict=True)
        }
        self.places = self.placed() if self.ragged else None
        self.lengths = torch.tensor(self.past, device=self.device) + self.new
        self.arrived = torch.zeros(batch * KV_HEADS, dtype=torch.int32, device=self.device)

    def stores(self, after: bool = False) -> list[Tensor]:
        """Full keys and values and streaming ones, before the new tokens or after; free slots hold 7."""
        batch, room = len(self.past), (self.capacity or max(self.past) + self.new) - self.dropped
        found = []
        for tokens in (self.keys, self.values):
            full = tokens.new_full((batch, len(self.full), room, self.dim), 7)
            if self.places is not None:
                full = tokens.new_full((batch, int(self.places[:, 1].sum(-1).max()), self.dim), 7)
            recent = tokens.new_full((batch, sum(self.slots), self.dim), 7)
            for sample, count in enumerate(self.past):
                end = count + self.new if after else count
                for place, head in enumerate(self.full):
                    gone = {*self.evicted(sample, head)}
                    kept = [token for token in range(end) if token not in gone]
                    own = full[sample, place] if self.places is None else full[sample, self.places[sample, 0, place] :]
                    own[: len(kept)] = tokens[sample, head, kept]
                for head, first in zip(self.streaming, self.first, strict=True):
                    span = self.span[head]
                    kept = sorted({*range(min(end, self.sink)), *range(max(0, end - span), end)})
                    rows = [first + slot(token, self.sink, span) for token in kept]
                    recent[sample, rows] = tokens[sample, head, kept]
            found.append((full, recent))
        return [found[0][0], found[1][0], found[0][1], found[1][1]]

    def evicted(self, sample: int, head: int) -> Sequence[int]:
        """The tokens that a retrieval head no longer sees."""
        return self.lost[sample, head] if self.ragged else range(head, head + self.dropped)

    def placed(self) -> Tensor:
        """First row, slots and evicted tokens of each retrieval head, (batch, 3, heads)."""
        room, found = self.capacity or max(self.past) + self.new, []
        for sample in range(len(self.past)):
            dropped = [len(self.lost[sample, head]) for head in self.full]
            slots = [room - count for count in dropped]
            found.append([[sum(slots[:place]) for place in range(len(slots))], slots, dropped])
        return torch.tensor(found, dtype=torch.int32, device=self.device)

    def expected(self) -> Tensor:
        """Dense attention in float64, (batch, query heads, new, head_dim)."""
        out = torch.zeros(self.query.shape, dtype=torch.float64, device=self.device)
        for sample, count in enumerate(self.past):
            i = torch.arange(count, count + self.new, device=self.device)[:, None]
            j = torch.arange(count + self.new, device=self.device)[None, :]
            for head in range(self.query.shape[1]):
                kv_head = head // self.group
                seen = j <= i
                if kv_head in self.span:
                    seen = seen & ((j < self.sink) | (i - j < self.span[kv_head]))
                else:
                    seen = seen & ~torch.isin(j, torch.tensor([*self.evicted(sample, kv_head)], device=self.device))
                keys, values = (x[sample, kv_head, : count + self.new].double() for x in (self.keys, self.values))
                scores = self.query[sample, head].double() @ keys.mT * self.scale
                out[sample, head] = scores.masked_fill(~seen, -torch.inf).softmax(-1) @ values
        return out

    def check(self, found: Tensor, heads: list[int] | None = None) -> None:
        """The greatest error in float32 is 1e-5, or 2e-5 over thousands of keys; in bfloat16 that of rounding twice."""
        expected = self.expected()
        if heads is not None:
            expected, found = (x.unflatten(1, (KV_HEADS, -1))[:, heads] for x in (expected, found))
        error = (found.double() - expected).abs().max()
        assert error <= ((2e-5 if self.pattern == "long" else 1e-5) if self.dtype == torch.float32 else 2e-2), (
            f"error {error:.1e}"
        )
