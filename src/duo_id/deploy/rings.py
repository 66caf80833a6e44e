"""The store of streaming heads: the sink and the most recent tokens of each head, in rings of any sizes."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from duo_id.attention.padding import reorder
from duo_id.attention.softmax import Softmax
from duo_id.attention.streaming import streaming_attention
from duo_id.attention.window import Window
from duo_id.deploy.stores import Heads, Store, with_slack


@dataclass(frozen=True)
class Ring:
    """The streaming heads of one span, and where their slots are in the store.

    The first `sink_size` slots of a head hold the sink, the others are a ring; see `decode_attention`.

    Attributes:
        window: what these heads see.
        heads: the heads.
        first: the place of the first of them among the store's heads; the others follow.
        row: the store's row with the first slot of the first head; the others follow.
        slots: of each head: its window, or fewer in a store that is still growing.
    """

    window: Window
    heads: Heads
    first: int
    row: int
    slots: int

    @property
    def end(self) -> int:
        """The row after the last slot."""
        return self.row + len(self.heads) * self.slots

    @property
    def local(self) -> slice:
        """The places of these heads in the store."""
        return slice(self.first, self.first + len(self.heads))

    def view(self, stored: Tensor) -> Tensor:
        """The slots (samples, heads, slots, head_dim) in `stored` (samples, rows, head_dim)."""
        return stored[:, self.row : self.end].unflatten(1, (len(self.heads), self.slots))

    def slot(self, token: Tensor) -> Tensor:
        """The slot of each token."""
        sink, recent = self.window.sink_size, self.window.recent_size
        return torch.where(token < sink, token, sink + (token - sink) % recent)

    def kept(self, past: int, new: int, device: torch.device) -> Tensor:
        """Those of `new` tokens after `past` that are kept: in the sink or among the most recent."""
        end, sink = past + new, self.window.sink_size
        latest = min(end, max(past, sink, end - self.window.recent_size))
        first = torch.arange(past, max(past, min(end, sink)), device=device)
        return torch.cat([first, torch.arange(latest, end, device=device)])


class StreamingStore(Store):
    """What streaming heads keep: keys and values (batch, rows, head_dim), the slots of one head after the other.

    The heads with the longest span come first; those of one span are a `Ring`.

    Args:
        like: (batch, KV heads, any, head_dim), a key of the layer, for sizes, type and device.
        spans: of each KV head of the layer, in tokens; -1 for retrieval heads, which are not in this store.
        sink_size: first tokens that all heads see.
        capacity: tokens to make room for, in a store of fixed size; None for one that starts empty and grows with the
            text until the windows are full.
        backend: see `streaming_attention`.

    Attributes:
        rings: the heads by span.
        spans: of the store's heads, in its order.
        slots: of the store's heads, in its order.
        listed: (3, heads) int32 on the device: the KV head, first row and span of each of the store's heads.
    """

    def __init__(self, like: Tensor, spans: Sequence[int], sink_size: int, capacity: int | None, backend: str) -> None:
        order = sorted((head for head, span in enumerate(spans) if span >= 0), key=lambda head: -spans[head])
        self.heads, self.spans = Heads(order), [spans[head] for head in order]
        self.sink_size, self.backend = sink_size, backend
        self.recorded: Tensor | None = None  # (batch, 2, heads, tokens, head_dim): keys and values beyond the window
        self.listed = torch.tensor([order, [0] * len(order), self.spans], dtype=torch.int32, device=like.device)
        self.rings: list[Ring] = []
        self._lay_out(capacity or 0)
        shape = (like.shape[0], self.rows, like.shape[3])
        self.key, self.value = (torch.zeros(shape, dtype=like.dtype, device=like.device) for _ in range(2))

    def _lay_out(self, most: int) -> None:
        """Give each head the slots of its window, but at most `most`."""
        self.rings, first = [], 0
        for span, members in groupby(self.heads, dict(zip(self.heads, self.spans, strict=True)).__getitem__):
            heads, window = Heads(members), Window(self.sink_size, span)
            self.rings.append(Ring(window, heads, first, self.rows, min(self.sink_size + span, most)))
            first += len(heads)
        self.slots = [ring.slots for ring in self.rings for _ in ring.heads]
        sizes = (self.listed[2] + self.sink_size).clamp(max=most)  # the same on the device: nothing waits for a copy
        self.listed = torch.stack([self.listed[0], (sizes.cumsum(0) - sizes).int(), self.listed[2]])

    @property
    def rows(self) -> int:
        """Slots of all heads together."""
        return self.rings[-1].end if self.rings else 0

    @torch.inference_mode(False)
    def reserve(self, tokens: int) -> None:
        """Give the rings that are not yet complete `tokens` slots and some slack, if there is no room."""
        if not self.rings or self.rings[0].slots >= min(tokens, self.sink_size + self.spans[0]):
            return
        before = self.rings
        self._lay_out(with_slack(tokens))
        for name in ("key", "value"):
            old = getattr(self, name)
            new = old.new_zeros(len(old), self.rows, old.shape[2])
            for then, now in zip(before, self.rings, strict=True):
                now.view(new)[:, :, : then.slots] = then.view(old)  # token t is in slot t until a ring is complete
            setattr(self, name, new)

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, out: Tensor, past: int, sample: slice, softmax: Softmax
    ) -> None:
        """See `Store.attend`."""
        if query.is_cuda and softmax.plain and self.backend in ("auto", "triton"):
            from duo_id.attention.kernels.prefill import stream

            stored = self.key[sample], self.value[sample], self.listed
            stream(query, key, value, *stored, past, self.sink_size, softmax.factor(query.shape[-1]), out)
        else:
            self._attend_by_rings(query, key, value, out, past, sample, softmax)
        self.put(key, value, past, sample)

    def _attend_by_rings(
        self, query: Tensor, key: Tensor, value: Tensor, out: Tensor, past: int, sample: slice, softmax: Softmax
    ) -> None:
        for ring in self.rings:
            order = ring.slot(ring.kept(0, past, key.device))
            keys, values = (
                torch.cat([ring.view(old[sample])[:, :, order], ring.heads.select(new)], 2)
                for old, new in ((self.key, key), (self.value, value))
            )

            def attend(q: Tensor, s: Softmax, k: Tensor = keys, v: Tensor = values, ring: Ring = ring) -> Tensor:
                return streaming_attention(q, k, v, s, ring.window, self.backend)

            ring.heads.attend(query, out, key.shape[1], softmax, attend)

    def put(self, key: Tensor, value: Tensor, past: int, sample: slice) -> None:
        """See `Store.put`."""
        if self.recorded is not None:
            self._record(key, value, past, sample)
        for ring in self.rings:
            kept = ring.kept(past, key.shape[2], key.device)
            slots = ring.slot(kept)
            for stored, new in ((self.key, key), (self.value, value)):
                ring.view(stored[sample])[:, :, slots] = ring.heads.select(new[:, :, kept - past])

    def put_first(self, key: Tensor, value: Tensor, lengths: Tensor) -> None:
        """See `Store.put_first`."""
        last, device, longest = lengths[:, None] - 1, key.device, key.shape[2] - 1
        for ring in self.rings:
            sink, recent = ring.window.sink_size, ring.window.recent_size
            slot = torch.arange(ring.slots, device=device)
            token = torch.where(slot < sink, slot, last - (last - slot) % recent)  # unused slots are masked
            for stored, new in ((self.key, key), (self.value, value)):
                ring.view(stored).copy_(reorder(ring.heads.select(new), token.clamp(0, longest)))
            if self.recorded is not None:
                size, before = self.recorded.shape[3], last - recent
                token = before - (before - torch.arange(size, device=device)) % size
                for i, new in enumerate((key, value)):
                    self.recorded[:, i, ring.local] = reorder(ring.heads.select(new), token.clamp(0, longest))

    @torch.inference_mode(False)
    def record(self, tokens: int) -> None:
        """From now on also keep `tokens` tokens beyond the windows, for `restore`: token t in slot t % tokens."""
        self.recorded = self.key.new_zeros(len(self.key), 2, len(self.heads), tokens, self.key.shape[2])

    @property
    def tensors(self) -> dict[str, Tensor]:
        """See `Store.tensors`."""
        return super().tensors | ({} if self.recorded is None else {"recorded": self.recorded})

    @property
    def overwritten(self) -> dict[str, Tensor]:
        """See `Store.overwritten`."""
        return self.tensors

    def retained_bytes(self, tokens: int) -> int:
        """See `Store.retained_bytes`."""
        rows = sum(min(tokens, self.sink_size + span) for span in self.spans)
        return 2 * rows * self.key.shape[2] * self.key.element_size()

    def _record(self, key: Tensor, value: Tensor, past: int, sample: slice) -> None:
        """Keep what leaves the windows as new tokens arrive, before its slots are overwritten."""
        assert self.recorded is not None
        size = self.recorded.shape[3]
        for ring in self.rings:
            sink, recent = ring.window.sink_size, ring.window.recent_size
            end = max(sink, past + key.shape[2] - recent)  # from here on every token is in the window
            start = max(sink, end - size)
            left = torch.arange(max(start, past - recent), max(start, min(end, past)), device=key.device)
            incoming = torch.arange(max(start, past), max(start, past, end), device=key.device)
            for i, (stored, new) in enumerate(((self.key, key), (self.value, value))):
                recorded = self.recorded[sample, i, ring.local]
                recorded[:, :, left % size] = ring.view(stored[sample])[:, :, ring.slot(left)]
                recorded[:, :, incoming % size] = ring.heads.select(new[:, :, incoming - past])

    def restore(self, length: int, tokens: int, floor: int, sample: int) -> None:
        """Put back into the windows what they cover again once the last tokens are removed.

        Args:
            length: tokens of the sample.
            tokens: how many of them are removed.
            floor: the smallest length to which the sample can be cropped, see `Tokens.floors`.
            sample: its index in the batch.
        """
        if self.recorded is None:
            return
        size, one = self.recorded.shape[3], slice(sample, sample + 1)
        for ring in self.rings:
            sink, recent = ring.window.sink_size, ring.window.recent_size
            start = max(sink, length - tokens - recent, floor + 1 - recent)
            end = min(length - recent, length - tokens)  # later tokens never left the window, or are removed
            restored = torch.arange(start, max(start, end), device=self.key.device)
            for i, stored in enumerate((self.key, self.value)):
                recorded = self.recorded[one, i, ring.local]
                ring.view(stored[one])[:, :, ring.slot(restored)] = recorded[:, :, restored % size]
