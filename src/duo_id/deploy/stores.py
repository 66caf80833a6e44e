"""The two stores of a layer: retrieval heads keep every token, streaming heads a constant number."""

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Self

import torch
from torch import Tensor

from duo_id.attention.full import full_attention
from duo_id.attention.padding import reorder
from duo_id.attention.softmax import Softmax
from duo_id.attention.streaming import streaming_attention
from duo_id.attention.window import Window

SLACK = 64  # tokens by which a growing store grows at least; beyond 8192 it grows by 1/128 of its length


class Store(ABC):
    """Keys and values of some KV heads of one layer; what a quantised store would have to offer.

    Attributes:
        heads: which KV heads of the layer lie here, ascending.
        runs: the same as pairs of slices, here and in the layer, of heads that are neighbours; copied as they are.
        key: (batch, heads, slots, head_dim).
        value: the same shape.
    """

    key: Tensor
    value: Tensor

    def __init__(self, like: Tensor, heads: Sequence[int], slots: int) -> None:
        self.heads = tuple(heads)
        edges = [i for i, head in enumerate(self.heads) if i == 0 or head != self.heads[i - 1] + 1]
        self.runs = [
            (slice(start, end), slice(self.heads[start], self.heads[end - 1] + 1))
            for start, end in pairwise([*edges, len(self.heads)])
        ]
        shape = (like.shape[0], len(self.heads), slots, like.shape[3])
        self.key, self.value = (torch.zeros(shape, dtype=like.dtype, device=like.device) for _ in range(2))

    @abstractmethod
    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, out: Tensor, past: int, sample: slice, softmax: Softmax
    ) -> None:
        """Attend from a chunk of tokens, and `put` them.

        Args:
            query: (samples, query heads, tokens, head_dim), of all heads of the layer.
            key: (samples, KV heads, tokens, head_dim), of all heads.
            value: the same shape.
            out: the query's shape; written at the heads of this store.
            past: tokens of these samples before the chunk.
            sample: which samples of the batch.
            softmax: of the layer.
        """

    @abstractmethod
    def put(self, key: Tensor, value: Tensor, past: int, sample: slice) -> None:
        """Store a chunk of tokens; arguments as of `attend`."""

    @abstractmethod
    def put_first(self, key: Tensor, value: Tensor, lengths: Tensor) -> None:
        """Store the first tokens of samples of unequal lengths.

        Args:
            key: (batch, KV heads, tokens, head_dim), each sample's real tokens first.
            value: the same shape.
            lengths: (batch,) int64, how many there are of each.
        """

    @abstractmethod
    def reserve(self, tokens: int) -> None:
        """Make room for so many tokens a sample, those that are there already among them."""

    def taken(self, x: Tensor) -> Tensor:
        """The part (samples, this store's heads, ...) of (samples, the layer's KV heads, ...)."""
        parts = [x[:, there] for _, there in self.runs]
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)

    def attention(
        self,
        query: Tensor,
        out: Tensor,
        kv_heads: int,
        softmax: Softmax,
        attend: Callable[[Tensor, Softmax], Tensor],
    ) -> None:
        """Attend from the queries of this store's heads, and put the result into their places of `out`."""
        chosen = self.taken(query.unflatten(1, (kv_heads, -1))).flatten(1, 2)
        found = attend(chosen, softmax.of(self.heads, kv_heads)).unflatten(1, (len(self.heads), -1))
        places = out.unflatten(1, (kv_heads, -1))
        for here, there in self.runs:
            places[:, there] = found[:, here]

    @property
    def tensors(self) -> dict[str, Tensor]:
        """What is kept, by attribute, the batch first."""
        return {"key": self.key, "value": self.value}

    @torch.inference_mode(False)
    def move(self, device: torch.device | str) -> None:
        """Take all that is kept to a device."""
        for name, tensor in self.tensors.items():
            setattr(self, name, tensor.to(device, non_blocking=True))

    @torch.inference_mode(False)
    def fork(self, samples: Tensor) -> Self:
        """A store of its own with the samples `samples[i]` (n,) int64."""
        twin = copy.copy(self)
        for name, tensor in self.tensors.items():
            setattr(twin, name, tensor.index_select(0, samples.to(tensor.device)))
        return twin

    @torch.inference_mode(False)
    def select(self, samples: Tensor) -> None:
        """Make sample `samples[i]` (n,) int64 the new sample i."""
        for name, old in self.tensors.items():
            new = old.index_select(0, samples.to(old.device))
            if new.shape == old.shape:
                old.copy_(new)  # at the old address, which a compiled or captured step may know
            else:
                setattr(self, name, new)

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(tensor.nbytes for tensor in self.tensors.values())


class FullStore(Store):
    """Every token of the retrieval heads: token t in slot t.

    Args:
        like: (batch, KV heads, any, head_dim), a key of the layer, for sizes, type and device.
        heads: KV heads, ascending.
        capacity: slots, for a store of fixed size; None for one that grows.
        backend: see `full_attention`.
    """

    def __init__(self, like: Tensor, heads: Sequence[int], capacity: int | None, backend: str) -> None:
        super().__init__(like, heads, capacity or 0)
        self.backend = backend

    @torch.inference_mode(False)
    def reserve(self, tokens: int) -> None:
        """Grow to `tokens` slots and some slack, so that few steps copy; what has room stays as it is.

        A copy comes every 64 steps at least, and moves what one or two steps of attention read.
        """
        slots = self.key.shape[2]
        if tokens <= slots:
            return
        room = tokens + max(SLACK, tokens // 128)
        for name in ("key", "value"):
            old = getattr(self, name)
            new = torch.empty((*old.shape[:2], room, old.shape[3]), dtype=old.dtype, device=old.device)
            new[:, :, :slots] = old
            new[:, :, slots:] = 0  # masked slots are multiplied by zero, which NaN would outlive
            setattr(self, name, new)

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, out: Tensor, past: int, sample: slice, softmax: Softmax
    ) -> None:
        """See `Store.attend`."""
        self.put(key, value, past, sample)
        end = past + key.shape[2]
        keys, values = self.key[sample, :, :end], self.value[sample, :, :end]
        self.attention(
            query, out, key.shape[1], softmax, lambda q, own: full_attention(q, keys, values, own, self.backend)
        )

    def put(self, key: Tensor, value: Tensor, past: int, sample: slice) -> None:
        """See `Store.put`."""
        end = past + key.shape[2]
        for here, there in self.runs:
            self.key[sample, here, past:end] = key[:, there]
            self.value[sample, here, past:end] = value[:, there]

    def put_first(self, key: Tensor, value: Tensor, lengths: Tensor) -> None:
        """See `Store.put_first`; what lies behind a sample's tokens is not seen and will be written over."""
        most = min(key.shape[2], self.key.shape[2])
        self.put(key[:, :, :most], value[:, :, :most], 0, slice(None))


class StreamingStore(Store):
    """The sink and the latest tokens of the streaming heads, the latter in a ring; see `decode_attention`.

    Args:
        like: (batch, KV heads, any, head_dim), a key of the layer, for sizes, type and device.
        heads: KV heads, ascending.
        window: sink and recent sizes, in tokens.
        backend: see `streaming_attention`.
    """

    def __init__(self, like: Tensor, heads: Sequence[int], window: Window, backend: str) -> None:
        super().__init__(like, heads, window.sink_size + window.recent_size)
        self.window, self.backend = window, backend
        self.recorded: Tensor | None = None  # (batch, 2, heads, tokens, head_dim): keys and values beyond the window
        self.listed = torch.tensor(self.heads, dtype=torch.int32, device=like.device)

    def reserve(self, tokens: int) -> None:
        """Nothing: the window has room for any number."""

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, out: Tensor, past: int, sample: slice, softmax: Softmax
    ) -> None:
        """See `Store.attend`."""
        stored = self.key[sample], self.value[sample]
        if query.is_cuda and softmax.plain and self.backend in ("auto", "triton"):
            from duo_id.attention.kernels.cached import stream

            scale = softmax.factor(query.shape[-1])
            stream(query, key, value, *stored, self.listed, past, self.window, scale, out)
        else:
            order = self._slot(self._kept(0, past, key.device))
            keys, values = (
                torch.cat([old[:, :, order], self.taken(new)], 2) for old, new in zip(stored, (key, value), strict=True)
            )
            self.attention(
                query,
                out,
                key.shape[1],
                softmax,
                lambda q, own: streaming_attention(q, keys, values, own, self.window, self.backend),
            )
        self.put(key, value, past, sample)

    def put(self, key: Tensor, value: Tensor, past: int, sample: slice) -> None:
        """See `Store.put`."""
        if self.recorded is not None:
            self._record(key, value, past, sample)
        kept = self._kept(past, key.shape[2], key.device)
        slots = self._slot(kept)
        for store, new in ((self.key, key), (self.value, value)):
            store[sample, :, slots] = self.taken(new[:, :, kept - past])

    def put_first(self, key: Tensor, value: Tensor, lengths: Tensor) -> None:
        """See `Store.put_first`."""
        sink, recent, device = self.window.sink_size, self.window.recent_size, key.device
        last = lengths[:, None] - 1
        slot = torch.arange(sink + recent, device=device)
        token = torch.where(slot < sink, slot, last - (last - slot) % recent)  # slots of no token are not looked at
        for store, new in ((self.key, key), (self.value, value)):
            store.copy_(reorder(self.taken(new), token.clamp(0, key.shape[2] - 1)))
        if self.recorded is not None:
            last, places = last - recent, self.recorded.shape[3]
            token = last - (last - torch.arange(places, device=device)) % places
            for i, new in enumerate((key, value)):
                self.recorded[:, i] = reorder(self.taken(new), token.clamp(0, key.shape[2] - 1))

    @torch.inference_mode(False)
    def record(self, tokens: int) -> None:
        """From now on keep so many tokens beyond the window too, for `take_back`: token t in place t % tokens."""
        batch, heads, _, dim = self.key.shape
        self.recorded = self.key.new_zeros(batch, 2, heads, tokens, dim)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """See `Store.tensors`."""
        return super().tensors | ({} if self.recorded is None else {"recorded": self.recorded})

    def _record(self, key: Tensor, value: Tensor, past: int, sample: slice) -> None:
        """Keep what leaves the window as new tokens come, before their slots are written."""
        assert self.recorded is not None
        sink, recent, places = self.window.sink_size, self.window.recent_size, self.recorded.shape[3]
        end = max(sink, past + key.shape[2] - recent)  # from here on all is in the window
        start = max(sink, end - places)
        stored = torch.arange(max(start, past - recent), max(start, min(end, past)), device=key.device)
        fresh = torch.arange(max(start, past), max(start, past, end), device=key.device)
        for i, (store, new) in enumerate(((self.key, key), (self.value, value))):
            kept = self.recorded[sample, i]
            kept[:, :, stored % places] = store[sample][:, :, self._slot(stored)]
            kept[:, :, fresh % places] = self.taken(new[:, :, fresh - past])

    def take_back(self, length: int, tokens: int, floor: int, sample: int) -> None:
        """Put into the window what it sees again once the latest tokens are gone.

        Args:
            length: tokens of the sample.
            tokens: how many of them go.
            floor: the first token that is kept at all.
            sample: which one.
        """
        if self.recorded is None:
            return
        sink, recent, places = self.window.sink_size, self.window.recent_size, self.recorded.shape[3]
        start = max(sink, length - tokens - recent, floor)
        end = min(length - recent, length - tokens)  # what is behind has never left the window, or goes
        again = torch.arange(start, max(start, end), device=self.key.device)
        for i, store in enumerate((self.key, self.value)):
            store[sample][:, self._slot(again)] = self.recorded[sample, i][:, again % places]

    def _slot(self, token: Tensor) -> Tensor:
        """The slots of tokens."""
        sink, recent = self.window.sink_size, self.window.recent_size
        return torch.where(token < sink, token, sink + (token - sink) % recent)

    def _kept(self, past: int, new: int, device: torch.device) -> Tensor:
        """Those of `new` tokens after `past` that stay: in the sink, or among the latest."""
        end, sink = past + new, self.window.sink_size
        latest = min(end, max(past, sink, end - self.window.recent_size))
        first = torch.arange(past, max(past, min(end, sink)), device=device)
        return torch.cat([first, torch.arange(latest, end, device=device)])
