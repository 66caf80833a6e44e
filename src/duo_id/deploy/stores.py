"""The stores of a layer: `FullStore` keeps every token of the retrieval heads; `rings` has that of streaming heads.

`ragged` has that of retrieval heads which keep unequally many tokens, and `quantised` that of codes.
"""

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise
from typing import Self

import torch
from torch import Tensor

from duo_id.attention.full import full_attention
from duo_id.attention.softmax import Softmax

SLACK = 64  # a growing store grows by at least this many tokens, and beyond 8192 by 1/128 of its length


class Heads:
    """Some KV heads of a layer, in the order in which a store keeps them.

    Attributes:
        indices: of the heads, in the layer.
        runs: the same as runs of adjacent heads, each a pair of slices: in the store, and in the layer.
    """

    def __init__(self, indices: Iterable[int]) -> None:
        self.indices = tuple(indices)
        edges = [i for i, head in enumerate(self.indices) if i == 0 or head != self.indices[i - 1] + 1]
        self.runs = [
            (slice(start, end), slice(self.indices[start], self.indices[end - 1] + 1))
            for start, end in pairwise([*edges, len(self.indices)])
        ]

    def __len__(self) -> int:
        """How many heads."""
        return len(self.indices)

    def __iter__(self) -> Iterator[int]:
        """Their indices in the layer."""
        return iter(self.indices)

    def select(self, x: Tensor) -> Tensor:
        """The part (samples, these heads, ...) of (samples, the layer's KV heads, ...)."""
        parts = [x[:, heads] for _, heads in self.runs]
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)

    def attend(
        self,
        query: Tensor,
        out: Tensor,
        kv_heads: int,
        softmax: Softmax,
        function: Callable[[Tensor, Softmax], Tensor],
    ) -> None:
        """Attend from the queries of these heads by `function`, and write the result to their rows of `out`."""
        queries = self.select(query.unflatten(1, (kv_heads, -1))).flatten(1, 2)
        result = function(queries, softmax.of(self.indices, kv_heads)).unflatten(1, (len(self), -1))
        grouped_out = out.unflatten(1, (kv_heads, -1))
        for local, heads in self.runs:
            grouped_out[:, heads] = result[:, local]


class Store(ABC):
    """Keys and values of some KV heads of one layer.

    Attributes:
        heads: the layer's KV heads in this store.
        key: batch first, head_dim last, in the model's type; all tokens, or those that are kept exactly.
        value: the same shape.
        dropped: tokens of each sample and head that were evicted; where heads differ, of the one that lost most.
        places: of heads that keep unequally many tokens, see `duo_id.deploy.ragged`; None: all keep equally many.
    """

    heads: Heads
    key: Tensor
    value: Tensor
    dropped = 0
    places: Tensor | None = None

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

    @abstractmethod
    def retained_bytes(self, tokens: int) -> int:
        """Bytes that one sample of `tokens` tokens keeps, without free slots."""

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The stored tensors by attribute name, batch first."""
        return {"key": self.key, "value": self.value}

    @property
    def overwritten(self) -> dict[str, Tensor]:
        """Those of the tensors in which new tokens take the place of older ones."""
        return {}

    @property
    def batch(self) -> int:
        """How many samples."""
        return len(self.key)

    @property
    def dtype(self) -> torch.dtype:
        """Type of keys and values as they come and as they are attended to."""
        return self.key.dtype

    @property
    def device(self) -> torch.device:
        """Device of all tensors."""
        return self.key.device

    def exact_from(self, tokens: int) -> int:
        """The smallest length to which a sample that once had `tokens` tokens can be cropped, as far as it tells."""
        return 0

    def fill(self, generator: torch.Generator) -> None:
        """Fill all slots with random numbers, for benchmarks."""
        for tensor in (self.key, self.value):
            tensor.normal_(generator=generator)

    @torch.inference_mode(False)
    def move(self, device: torch.device | str) -> None:
        """Move all stored tensors to a device."""
        for name, tensor in self.tensors.items():
            setattr(self, name, tensor.to(device, non_blocking=True))

    @torch.inference_mode(False)
    def fork(self, samples: Tensor, capacity: int | None = None) -> Self:
        """An independent store with the samples `samples[i]` (n,) int64; `capacity`: tokens to make room for."""
        copied = copy.copy(self)
        for name, tensor in self.tensors.items():
            setattr(copied, name, tensor.index_select(0, samples.to(tensor.device)))
        if capacity is not None:
            copied.reserve(capacity)
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
    """Every token of the retrieval heads: keys and values (batch, heads, slots, head_dim), token t in slot t.

    Once some tokens were evicted, those that stayed come first, in their order, and later tokens follow them: token t
    in slot t - dropped. Heads keep equally many tokens, each its own.

    Args:
        like: (batch, KV heads, any, head_dim), a key of the layer, for sizes, type and device.
        heads: KV heads, ascending.
        capacity: slots, for a store of fixed size; None for one that grows.
        backend: see `full_attention`.

    Attributes:
        listed: (heads,) int32 on the device, the KV heads.
    """

    def __init__(self, like: Tensor, heads: Iterable[int], capacity: int | None, backend: str) -> None:
        self.heads, self.backend = Heads(heads), backend
        shape = (like.shape[0], len(self.heads), capacity or 0, like.shape[3])
        self.key, self.value = (torch.zeros(shape, dtype=like.dtype, device=like.device) for _ in range(2))
        self.listed = torch.tensor(self.heads.indices, dtype=torch.int32, device=like.device)

    @torch.inference_mode(False)
    def reserve(self, tokens: int) -> None:
        """Grow to `tokens` slots plus some slack, if there is no room, so that few steps copy.

        At most every 64th step copies, and moves as much as one or two steps of attention read.
        """
        slots, tokens = self.key.shape[2], tokens - self.dropped
        if tokens <= slots:
            return
        for name in ("key", "value"):
            old = getattr(self, name)
            new = torch.empty((*old.shape[:2], with_slack(tokens), old.shape[3]), dtype=old.dtype, device=old.device)
            new[:, :, :slots] = old
            new[:, :, slots:] = 0  # masked slots are multiplied by zero, which would keep a NaN
            setattr(self, name, new)

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, out: Tensor, past: int, sample: slice, softmax: Softmax
    ) -> None:
        """See `Store.attend`."""
        self.put(key, value, past, sample)
        end = past - self.dropped + key.shape[2]
        keys, values = self.key[sample, :, :end], self.value[sample, :, :end]
        self.heads.attend(
            query, out, key.shape[1], softmax, lambda q, s: full_attention(q, keys, values, s, self.backend)
        )

    def put(self, key: Tensor, value: Tensor, past: int, sample: slice) -> None:
        """See `Store.put`."""
        past -= self.dropped
        end = past + key.shape[2]
        for local, heads in self.heads.runs:
            self.key[sample, local, past:end] = key[:, heads]
            self.value[sample, local, past:end] = value[:, heads]

    def put_first(self, key: Tensor, value: Tensor, lengths: Tensor) -> None:
        """See `Store.put_first`; slots beyond a sample's tokens are masked, and overwritten later."""
        most = min(key.shape[2], self.key.shape[2])
        self.put(key[:, :, :most], value[:, :, :most], 0, slice(None))

    def retained_bytes(self, tokens: int) -> int:
        """See `Store.retained_bytes`."""
        return 2 * (tokens - self.dropped) * len(self.heads) * self.key.shape[3] * self.key.element_size()

    @torch.inference_mode(False)
    def keep(self, slots: Tensor, tokens: int, grows: bool) -> None:
        """Keep what is in some slots and free the memory of the rest.

        Args:
            slots: (batch, heads, n) int64, ascending.
            tokens: of each sample so far.
            grows: otherwise as much room is left as before.
        """
        used, kept = tokens - self.dropped, slots.shape[2]
        room = SLACK if grows else self.key.shape[2] - used
        for name in ("key", "value"):
            old = getattr(self, name)
            new = old.new_zeros(*old.shape[:2], kept + room, old.shape[3])
            new[:, :, :kept] = old.gather(2, slots[..., None].expand(*slots.shape, old.shape[3]))
            setattr(self, name, new)
        self.dropped += used - kept


def with_slack(tokens: int) -> int:
    """The slots of a store that grows because it needs `tokens`."""
    return tokens + max(SLACK, tokens // 128)
