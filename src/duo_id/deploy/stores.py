"""The two stores of a layer: retrieval heads keep every token, streaming heads a constant number."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from duo_id.attention.full import full_attention
from duo_id.attention.masks import Window
from duo_id.attention.streaming import streaming_attention
from duo_id.errors import UserError

SLACK = 64  # tokens by which a growing store grows at least; beyond 8192 it grows by 1/128 of its length


class Store(ABC):
    """Keys and values of some KV heads of one layer; what a quantised store would have to offer.

    Attributes:
        heads: (heads,) int64, which KV heads of the layer lie here, in this order.
        key: (batch, heads, slots, head_dim).
        value: the same shape.
    """

    heads: Tensor
    key: Tensor
    value: Tensor

    @abstractmethod
    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, out: Tensor, past: int, sample: slice, scale: float
    ) -> None:
        """Store a chunk of tokens and attend from it.

        Args:
            query: (samples, query heads, tokens, head_dim), of all heads of the layer.
            key: (samples, KV heads, tokens, head_dim), of all heads.
            value: the same shape.
            out: the query's shape; written at the heads of this store.
            past: tokens of these samples before the chunk.
            sample: which samples of the batch.
            scale: factor on the scores.
        """

    @abstractmethod
    def reserve(self, tokens: int) -> None:
        """Make room for so many tokens a sample, those that are there already among them."""

    def select(self, samples: Tensor) -> None:
        """Make sample `samples[i]` (n,) int64 the new sample i."""
        for name in ("key", "value"):
            old = getattr(self, name)
            new = old.index_select(0, samples.to(old.device))
            if new.shape == old.shape:
                old.copy_(new)  # at the old address, which a compiled or captured step may know
            else:
                setattr(self, name, new)

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self.key.nbytes + self.value.nbytes


class FullStore(Store):
    """Every token of the retrieval heads: token t in slot t.

    Args:
        like: (batch, KV heads, any, head_dim), a key of the layer, for sizes, type and device.
        heads: (heads,) int64 KV heads.
        capacity: slots, for a store of fixed size; None for one that grows.
        backend: see `full_attention`.
    """

    def __init__(self, like: Tensor, heads: Tensor, capacity: int | None, backend: str) -> None:
        self.heads, self.capacity, self.backend = heads, capacity, backend
        shape = (like.shape[0], len(heads), capacity or 0, like.shape[3])
        self.key, self.value = (torch.zeros(shape, dtype=like.dtype, device=like.device) for _ in range(2))

    def reserve(self, tokens: int) -> None:
        """Grow to `tokens` slots and some slack, so that few steps copy; a fixed store refuses instead.

        A copy comes every 64 steps at least, and moves what one or two steps of attention read.
        """
        slots = self.key.shape[2]
        if tokens <= slots:
            return
        if self.capacity is not None:
            raise UserError(
                f"the static cache holds {slots} tokens and would need {tokens}: give it a larger max_length "
                "(or generate with a larger max_length)"
            )
        room = tokens + max(SLACK, tokens // 128)
        for name in ("key", "value"):
            old = getattr(self, name)
            new = torch.empty((*old.shape[:2], room, old.shape[3]), dtype=old.dtype, device=old.device)
            new[:, :, :slots] = old
            new[:, :, slots:] = 0  # masked slots are multiplied by zero, which NaN would outlive
            setattr(self, name, new)

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, out: Tensor, past: int, sample: slice, scale: float
    ) -> None:
        """See `Store.attend`."""
        end = past + key.shape[2]
        self.key[sample, :, past:end] = key[:, self.heads]
        self.value[sample, :, past:end] = value[:, self.heads]
        queries = query.unflatten(1, (key.shape[1], -1))[:, self.heads].flatten(1, 2)
        part = full_attention(queries, self.key[sample, :, :end], self.value[sample, :, :end], scale, self.backend)
        out.unflatten(1, (key.shape[1], -1))[:, self.heads] = part.unflatten(1, (len(self.heads), -1))


class StreamingStore(Store):
    """The sink and the latest tokens of the streaming heads, the latter in a ring; see `decode_attention`.

    Args:
        like: (batch, KV heads, any, head_dim), a key of the layer, for sizes, type and device.
        heads: (heads,) int64 KV heads.
        window: sink and recent sizes, in tokens.
        backend: see `streaming_attention`.
    """

    def __init__(self, like: Tensor, heads: Tensor, window: Window, backend: str) -> None:
        self.heads, self.window, self.backend = heads, window, backend
        shape = (like.shape[0], len(heads), window.sink_size + window.recent_size, like.shape[3])
        self.key, self.value = (torch.zeros(shape, dtype=like.dtype, device=like.device) for _ in range(2))
        self.short_heads = heads.to(torch.int32)

    def reserve(self, tokens: int) -> None:
        """Nothing: the window has room for any number."""

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, out: Tensor, past: int, sample: slice, scale: float
    ) -> None:
        """See `Store.attend`."""
        stored = self.key[sample], self.value[sample]
        if query.is_cuda and self.backend in ("auto", "triton"):
            from duo_id.attention.kernels import stream

            stream(query, key, value, *stored, self.short_heads, past, self.window, scale, out)
            kept = self._kept(past, key.shape[2], key.device)
            new = (x[:, :, kept - past][:, self.heads] for x in (key, value))
        else:
            new_key, new_value = key[:, self.heads], value[:, self.heads]
            order = self._order(past, key.device)
            keys = torch.cat([stored[0][:, :, order], new_key], 2)
            values = torch.cat([stored[1][:, :, order], new_value], 2)
            queries = query.unflatten(1, (key.shape[1], -1))[:, self.heads].flatten(1, 2)
            part = streaming_attention(queries, keys, values, scale, self.window, self.backend)
            out.unflatten(1, (key.shape[1], -1))[:, self.heads] = part.unflatten(1, (len(self.heads), -1))
            kept = self._kept(past, key.shape[2], key.device)
            new = (x[:, :, kept - past] for x in (new_key, new_value))
        slots = self._slot(kept)
        for store, tokens in zip(stored, new, strict=True):
            store[:, :, slots] = tokens

    def _slot(self, token: Tensor) -> Tensor:
        sink, recent = self.window.sink_size, self.window.recent_size
        return torch.where(token < sink, token, sink + (token - sink) % recent)

    def _order(self, past: int, device: torch.device) -> Tensor:
        """The slots of what is kept of `past` tokens, in the order of the tokens."""
        return self._slot(self._kept(0, past, device))

    def _kept(self, past: int, new: int, device: torch.device) -> Tensor:
        """Those of `new` tokens after `past` that stay: in the sink, or among the latest."""
        end, sink = past + new, self.window.sink_size
        latest = min(end, max(past, sink, end - self.window.recent_size))
        first = torch.arange(past, max(past, min(end, sink)), device=device)
        return torch.cat([first, torch.arange(latest, end, device=device)])
