"""The two stores of a layer: retrieval heads keep every token, streaming heads a constant number of tokens."""

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

SLACK = 64  # a growing store grows by at least this many tokens, and beyond 8192 by 1/128 of its length


class Store(ABC):
    """Keys and values of some KV heads of one layer; the interface that a quantised store would implement.

    Attributes:
        heads: the layer's KV heads in this store, ascending.
        runs: the same as runs of adjacent heads, each a pair of slices: in the store, and in the layer.
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
            past: number of tokens of these samples before the chunk.
            sample: which samples of the batch.
            softmax: of the layer.
        """

    @abstractmethod
    def put(self, key: Tensor, value: Tensor, past: int, sample: slice) -> None:
        """Store a chunk of tokens; see `attend` for the arguments."""

    @abstractmethod
    def put_first(self, key: Tensor, value: Tensor, lengths: Tensor) -> None:
        """Store the first tokens of samples of unequal lengths.

        Args:
            key: (batch, KV heads, tokens, head_dim), each sample's real tokens first.
            value: the same shape.
            lengths: (batch,) int64, the number of real tokens of each sample.
        """

    @abstractmethod
    def reserve(self, tokens: int) -> None:
        """Make room for `tokens` tokens per sample, including those already stored."""

    def select_heads(self, x: Tensor) -> Tensor:
        """The part (samples, this store's heads, ...) of (samples, the layer's KV heads, ...)."""
        parts = [x[:, heads] for _, heads in self.runs]
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)

    def attention(
        self,
        query: Tensor,
        out: Tensor,
        kv_heads: int,
        softmax: Softmax,
        attend: Callable[[Tensor, Softmax], Tensor],
    ) -> None:
        """Attend from the queries of this store's heads and write the result to their rows of `out`."""
        queries = self.select_heads(query.unflatten(1, (kv_heads, -1))).flatten(1, 2)
        result = attend(queries, softmax.of(self.heads, kv_heads)).unflatten(1, (len(self.heads), -1))
        grouped_out = out.unflatten(1, (kv_heads, -1))
        for local, heads in self.runs:
            grouped_out[:, heads] = result[:, local]

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The stored tensors by attribute name, batch first."""
        return {"key": self.key, "value": self.value}

    @torch.inference_mode(False)
    def move(self, device: torch.device | str) -> None:
        """Move all stored tensors to a device."""
        for name, tensor in self.tensors.items():
            setattr(self, name, tensor.to(device, non_blocking=True))

    @torch.inference_mode(False)
    def fork(self, samples: Tensor) -> Self:
        """An independent store with the samples `samples[i]` (n,) int64."""
        copied = copy.copy(self)
        for name, tensor in self.tensors.items():
            setattr(copied, name, tensor.index_select(0, samples.to(tensor.device)))
        return copied

    @torch.inference_mode(False)
    def select(self, samples: Tensor) -> None:
        """Make sample `samples[i]` (n,) int64 the new sample i."""
        for name, old in self.tensors.items():
            new = old.index_select(0, samples.to(old.device))
            if new.shape == old.shape:
                old.copy_(new)  # in place: a compiled or captured step may hold the address
            else:
                setattr(self, name, new)

    @property
    def nbytes(self) -> int:
        """Bytes of all stored tensors."""
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
        """Grow to `tokens` slots plus some slack, if there is no room, so that few steps copy.

        At most every 64th step copies, and moves as much as one or two steps of attention read.
        """
        slots = self.key.shape[2]
        if tokens <= slots:
            return
        new_slots = tokens + max(SLACK, tokens // 128)
        for name in ("key", "value"):
            old = getattr(self, name)
            new = torch.empty((*old.shape[:2], new_slots, old.shape[3]), dtype=old.dtype, device=old.device)
            new[:, :, :slots] = old
            new[:, :, slots:] = 0  # masked slots are multiplied by zero, which would keep a NaN
            setattr(self, name, new)

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, out: Tensor, past: int, sample: slice, softmax: Softmax
    ) -> None:
        """See `Store.attend`."""
        self.put(key, value, past, sample)
        end = past + key.shape[2]
        keys, values = self.key[sample, :, :end], self.value[sample, :, :end]
        self.attention(query, out, key.shape[1], softmax, lambda q, s: full_attention(q, keys, values, s, self.backend))

    def put(self, key: Tensor, value: Tensor, past: int, sample: slice) -> None:
        """See `Store.put`."""
        end = past + key.shape[2]
        for local, heads in self.runs:
            self.key[sample, local, past:end] = key[:, heads]
            self.value[sample, local, past:end] = value[:, heads]

    def put_first(self, key: Tensor, value: Tensor, lengths: Tensor) -> None:
        """See `Store.put_first`; slots beyond a sample's tokens are masked, and overwritten later."""
        most = min(key.shape[2], self.key.shape[2])
        self.put(key[:, :, :most], value[:, :, :most], 0, slice(None))


class StreamingStore(Store):
    """The sink and the most recent tokens of the streaming heads, the latter in a ring; see `decode_attention`.

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
        """Do nothing: the window has a fixed size."""

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
                torch.cat([old[:, :, order], self.select_heads(new)], 2)
                for old, new in zip(stored, (key, value), strict=True)
            )
            self.attention(
                query,
                out,
                key.shape[1],
                softmax,
                lambda q, s: streaming_attention(q, keys, values, s, self.window, self.backend),
            )
        self.put(key, value, past, sample)

    def put(self, key: Tensor, value: Tensor, past: int, sample: slice) -> None:
        """See `Store.put`."""
        if self.recorded is not None:
            self._record(key, value, past, sample)
        kept = self._kept(past, key.shape[2], key.device)
        slots = self._slot(kept)
        for store, new in ((self.key, key), (self.value, value)):
            store[sample, :, slots] = self.select_heads(new[:, :, kept - past])

    def put_first(self, key: Tensor, value: Tensor, lengths: Tensor) -> None:
        """See `Store.put_first`."""
        sink, recent, device = self.window.sink_size, self.window.recent_size, key.device
        last = lengths[:, None] - 1
        slot = torch.arange(sink + recent, device=device)
        token = torch.where(slot < sink, slot, last - (last - slot) % recent)  # unused slots are masked
        for store, new in ((self.key, key), (self.value, value)):
            store.copy_(reorder(self.select_heads(new), token.clamp(0, key.shape[2] - 1)))
        if self.recorded is not None:
            last, size = last - recent, self.recorded.shape[3]
            token = last - (last - torch.arange(size, device=device)) % size
            for i, new in enumerate((key, value)):
                self.recorded[:, i] = reorder(self.select_heads(new), token.clamp(0, key.shape[2] - 1))

    @torch.inference_mode(False)
    def record(self, tokens: int) -> None:
        """From now on also keep `tokens` tokens beyond the window, for `restore`: token t in slot t % tokens."""
        batch, heads, _, dim = self.key.shape
        self.recorded = self.key.new_zeros(batch, 2, heads, tokens, dim)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """See `Store.tensors`."""
        return super().tensors | ({} if self.recorded is None else {"recorded": self.recorded})

    def _record(self, key: Tensor, value: Tensor, past: int, sample: slice) -> None:
        """Keep what leaves the window as new tokens arrive, before its slots are overwritten."""
        assert self.recorded is not None
        sink, recent, size = self.window.sink_size, self.window.recent_size, self.recorded.shape[3]
        end = max(sink, past + key.shape[2] - recent)  # from here on every token is in the window
        start = max(sink, end - size)
        stored = torch.arange(max(start, past - recent), max(start, min(end, past)), device=key.device)
        incoming = torch.arange(max(start, past), max(start, past, end), device=key.device)
        for i, (store, new) in enumerate(((self.key, key), (self.value, value))):
            recorded = self.recorded[sample, i]
            recorded[:, :, stored % size] = store[sample][:, :, self._slot(stored)]
            recorded[:, :, incoming % size] = self.select_heads(new[:, :, incoming - past])

    def restore(self, length: int, tokens: int, floor: int, sample: int) -> None:
        """Put back into the window what it covers again once the last tokens are removed.

        Args:
            length: tokens of the sample.
            tokens: how many of them are removed.
            floor: the first token that is still stored.
            sample: its index in the batch.
        """
        if self.recorded is None:
            return
        sink, recent, size = self.window.sink_size, self.window.recent_size, self.recorded.shape[3]
        start = max(sink, length - tokens - recent, floor)
        end = min(length - recent, length - tokens)  # later tokens never left the window, or are removed
        restored = torch.arange(start, max(start, end), device=self.key.device)
        for i, store in enumerate((self.key, self.value)):
            store[sample][:, self._slot(restored)] = self.recorded[sample, i][:, restored % size]

    def _slot(self, token: Tensor) -> Tensor:
        """The slot of each token."""
        sink, recent = self.window.sink_size, self.window.recent_size
        return torch.where(token < sink, token, sink + (token - sink) % recent)

    def _kept(self, past: int, new: int, device: torch.device) -> Tensor:
        """Those of `new` tokens after `past` that are kept: in the sink or among the most recent."""
        end, sink = past + new, self.window.sink_size
        latest = min(end, max(past, sink, end - self.window.recent_size))
        first = torch.arange(past, max(past, min(end, sink)), device=device)
        return torch.cat([first, torch.arange(latest, end, device=device)])
