"""One layer of the dual cache."""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from duo_id.attention.codes import Bits
from duo_id.attention.decode import decode_attention
from duo_id.attention.decode_codes import decode_codes_attention
from duo_id.attention.functions import Backends
from duo_id.attention.interface import as_autocast
from duo_id.attention.layers import AttentionLayer
from duo_id.attention.padding import reorder
from duo_id.attention.softmax import Softmax
from duo_id.common.errors import UserError
from duo_id.deploy.arriving import ArrivingKeys
from duo_id.deploy.counts import Tokens
from duo_id.deploy.quantised import QuantisedStore
from duo_id.deploy.ragged import RaggedStore
from duo_id.deploy.rings import StreamingStore
from duo_id.deploy.stores import FullStore, Store
from duo_id.patterns.spans import ALL

Observer = Callable[[Tensor, Softmax], None]


class DualLayer(CacheLayerMixin):
    """One layer of the cache: a full store for its retrieval heads, a streaming store for the others.

    Args:
        layer: the attention layer.
        spans: of each KV head: the latest tokens that it sees, -1 for all of them.
        sink_size: first tokens that all heads see.
        tokens: counts, shared by the layers of a cache.
        leads: whether it is the first layer of a forward, the one that counts the tokens.
        capacity: slots of the full store; None for one that grows.
        backends: attention implementations of prefill.
        bits: of the full store's keys and values; None: it keeps them as they are.

    Attributes:
        widened: whether heads see everything because a static cache's room is no longer than their span.
        observer: is shown the queries (batch, heads, tokens, head_dim) of each forward once its tokens are stored.
    """

    is_sliding = False

    def __init__(
        self,
        layer: AttentionLayer,
        spans: Sequence[int],
        sink_size: int,
        tokens: Tokens,
        leads: bool,
        capacity: int | None,
        backends: Backends,
        bits: Bits | None = None,
    ) -> None:
        self.is_initialized = False
        self.layer, self.sink_size, self.tokens = layer, sink_size, tokens
        self.leads, self.capacity, self.backends, self.bits = leads, capacity, backends, bits
        # A window as large as a static cache hides nothing, and needs no ring; but rings are never codes.
        whole = capacity if bits is None else None
        self.spans = [ALL if whole is not None and sink_size + span >= whole else span for span in spans]
        self.widened = self.spans != list(spans)
        self.is_compileable = capacity is not None
        self.home: torch.device | None = None  # the device of an offloaded layer
        self.observer: Observer | None = None
        self.before: list[dict[str, Tensor]] = []  # what the running chunk overwrites, if layers share their keys
        self.full: FullStore | RaggedStore | QuantisedStore
        self.recent: StreamingStore

    @torch.inference_mode(False)  # so that the cache also works outside such a block
    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate empty stores for keys like `key_states` (batch, KV heads, any, head_dim)."""
        device = key_states.device
        if self.tokens.lengths is None:
            self.tokens.start(len(key_states), device)
        retrieval_heads = [head for head, span in enumerate(self.spans) if span == ALL]
        given = key_states, retrieval_heads, self.capacity, self.backends.full
        self.full = FullStore(*given) if self.bits is None else QuantisedStore(*given, self.bits)
        self.recent = StreamingStore(key_states, self.spans, self.sink_size, self.capacity, self.backends.streaming)
        self.arrived = torch.zeros(key_states.shape[:2].numel(), dtype=torch.int32, device=device)
        self._pin()
        self.is_initialized = True
        if self.tokens.recorded:
            self.record()

    def update(  # type: ignore[override]
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[ArrivingKeys, Tensor]:
        """Accept new keys and values (batch, KV heads, tokens, head_dim), stored once their queries attend."""
        key_states, value_states = as_autocast(key_states, value_states)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        stored = self.full
        if len(key_states) != stored.batch:
            raise UserError(
                f"the cache holds {stored.batch} samples, but the batch has {len(key_states)}: use a new cache"
            )
        if key_states.dtype != stored.dtype:
            raise UserError(
                f"the cache holds {stored.dtype} keys, but new keys are {key_states.dtype}: use the same "
                "torch.autocast for all forwards with a cache"
            )
        return ArrivingKeys(self, key_states, value_states), value_states

    @torch.no_grad()
    def attend(self, query: Tensor, key: Tensor, value: Tensor, softmax: Softmax, shared: bool = False) -> Tensor:
        """Store new tokens and attend from them; see `ArrivingKeys.attend`.

        Args:
            query: (batch, heads, tokens, head_dim).
            key: (batch, KV heads, tokens, head_dim).
            value: the same shape.
            softmax: of the layer.
            shared: whether the layer whose keys this one shares has already stored them.
        """
        new, tokens = key.shape[2], self.tokens
        query, key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value))
        if self.layer.sharers and (new > 1 or tokens.recorded):
            self._rewind(shared)
        if new == 1 and not tokens.recorded:
            out = self._decode(query, key, value, softmax)
        else:
            out = self._attend_chunk(query, key, value, softmax)
        if self.observer is not None:
            self.observer(query, softmax)
        return out

    def _attend_chunk(self, query: Tensor, key: Tensor, value: Tensor, softmax: Softmax) -> Tensor:
        """Several tokens, see `attend`."""
        new, tokens = key.shape[2], self.tokens
        # Tokens before heads in memory, the layout that the model continues with. Padding needs zeros: nothing else
        # writes there.
        contiguous = tokens.uniform and tokens.places[0] == slice(0, new)
        allocate = torch.empty if contiguous else torch.zeros
        batch, heads, _, dim = query.shape
        out = allocate(batch, new, heads, dim, dtype=query.dtype, device=query.device).transpose(1, 2)
        for sample, past, places in tokens.parts:
            part = (sample, slice(None), places)
            chunk_out = out[part]
            for store in self.stores:
                if len(store.heads) and chunk_out.shape[2]:
                    store.attend(query[part], key[part], value[part], chunk_out, past, sample, softmax)
            if isinstance(places, Tensor):
                out[part] = chunk_out
        return out

    @torch.no_grad()
    def put(self, key: Tensor, value: Tensor) -> None:
        """Store the first tokens, whose attention is computed without the cache."""
        tokens, stores = self.tokens, [store for store in self.stores if len(store.heads)]
        if tokens.uniform:
            places = tokens.places[0]
            for store in stores:
                store.put(key[:, :, places], value[:, :, places], 0, slice(None))
        else:
            order, lengths = tokens.order(key.device), torch.tensor(tokens.new, device=key.device)
            key, value = reorder(key, order), reorder(value, order)
            for store in stores:
                store.put_first(key, value, lengths)

    def evict(self, kept: Tensor) -> None:
        """Keep some slots of the full store: (batch, retrieval heads, n) int64, or a mask (..., slots) if n differs."""
        assert isinstance(self.full, FullStore)
        if kept.dtype == torch.bool:
            self.full = RaggedStore(self.full, kept, self.tokens.held[0], grows=self.capacity is None)
        else:
            self.full.keep(kept, self.tokens.held[0], grows=self.capacity is None)
        self._pin()

    def _pin(self) -> None:
        """Tell the compiler that the tensors of a static layer stay where they are."""
        if self.is_compileable and not torch.compiler.is_compiling():
            for tensor in (*self.full.tensors.values(), *self.recent.tensors.values(), self.arrived):
                torch._dynamo.mark_static_address(tensor)

    def begin(self, new: int) -> None:
        """Count new tokens (first layer only) and make room for them."""
        if self.leads:
            if not self.tokens.announced:
                raise UserError("a submodule was called on its own with a dual cache: call the whole model")
            self.tokens.advance(new, self.capacity)
        if self.capacity is None:
            for store in self.stores:
                store.reserve(self.tokens.most)

    def _rewind(self, shared: bool) -> None:
        """Restore what a chunk that layers share has overwritten, because each of them sees it."""
        if shared:
            for store, before in zip(self.stores, self.before, strict=True):
                for name, tensor in before.items():
                    getattr(store, name).copy_(tensor)
        else:
            self.before = [{name: x.clone() for name, x in store.overwritten.items()} for store in self.stores]

    def _decode(self, query: Tensor, key: Tensor, value: Tensor, softmax: Softmax) -> Tensor:
        assert self.tokens.reach is not None
        full, recent, lengths = self.full, self.recent, self.tokens.reach.to(query.device)
        new, exact = (query, key, value), (full.key, full.value, recent.key, recent.value)
        counts = full.listed, recent.listed, lengths, self.arrived, recent.spans, recent.slots, self.sink_size
        scores = softmax.factor(query.shape[-1]), softmax.softcap, softmax.sinks
        if not isinstance(full, QuantisedStore):
            return decode_attention(*new, *exact, *counts, *scores, full.dropped, full.places)
        coded = full.key_codes, full.key_scales, full.value_codes, full.value_scales
        return decode_codes_attention(*new, *coded, *exact, *counts, *scores)

    @property
    def stores(self) -> tuple[Store, Store]:
        """Both stores."""
        return self.full, self.recent

    def record(self) -> None:
        """Keep `tokens.recorded` tokens beyond the window; see `DualCache.activate_past_recording`."""
        if self.is_initialized:
            self.recent.record(self.tokens.recorded)

    @property
    def is_croppable(self) -> bool:  # type: ignore[override]
        """Whether the last tokens can be removed at any length."""
        return self.tokens.recorded > 0 or (self.bits is None and all(span == ALL for span in self.spans))

    @property
    def keys(self) -> None:  # type: ignore[override]
        """None before the first token; a `UserError` afterwards, because no tensor holds the keys of all heads."""
        if self.is_initialized:
            raise UserError(
                "a dual cache has no tensor with the keys or values of all heads: those of retrieval heads are in "
                "layer.full.key and .value, those of streaming heads in layer.recent.key and .value"
            )

    values = keys

    @property
    def device(self) -> torch.device | None:
        """Device of keys and values; None before the first token."""
        return self.full.device if self.is_initialized else None

    @property
    def dtype(self) -> torch.dtype | None:
        """Type of keys and values; None before the first token."""
        return self.full.dtype if self.is_initialized else None

    def offload(self) -> None:
        """Move keys and values to the CPU; call `prefetch` before the next forward."""
        if self.is_initialized and self.capacity is None:
            self.home = self.home or self.full.device
            for store in self.stores:
                store.move("cpu")
        elif self.capacity is not None:
            raise UserError(
                "a static cache cannot be offloaded, because compiled steps hold its address: leave max_length out"
            )

    def prefetch(self) -> None:
        """Move keys and values back to their device."""
        if self.home is not None:
            for store in self.stores:
                store.move(self.home)
            self.home = None

    @property
    def batch_size(self) -> int:
        """Samples in the cache; -1 before the first forward."""
        return self.full.batch if self.is_initialized else -1

    @property
    def nbytes(self) -> int:
        """Bytes held by both stores."""
        return sum(store.nbytes for store in self.stores) if self.is_initialized else 0

    def retained_bytes(self, tokens: int) -> int:
        """Bytes that one sample of `tokens` tokens keeps."""
        return sum(store.retained_bytes(tokens) for store in self.stores) if self.is_initialized else 0

    def get_seq_length(self) -> int:
        """Tokens seen so far, including padding."""
        return self.tokens.seen if self.is_initialized else 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Number of keys that a mask for the next `query_length` tokens covers, and the first of them."""
        if self.capacity is not None:  # never equal to the number of queries: so `padding_mask` recognises a cache
            return self.capacity + (self.capacity == query_length), 0
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        """The capacity in tokens; -1 for no limit."""
        return -1 if self.capacity is None else self.capacity

    def reset(self) -> None:
        """Forget all tokens; a growing layer frees its memory, and a static one of which tokens were evicted moves."""
        if self.capacity is None:
            self.is_initialized = False
            self.__dict__.pop("full", None), self.__dict__.pop("recent", None)
        elif self.is_initialized and self.full.dropped:  # its room is gone
            self.is_initialized = False

    def fork(self, samples: Tensor, tokens: Tokens, capacity: int | None) -> "DualLayer":
        """An independent layer with the samples `samples[i]`, counted by `tokens`, with room for `capacity` tokens."""
        copied = copy.copy(self)
        copied.tokens, copied.capacity, copied.is_compileable = tokens, capacity, capacity is not None
        if self.is_initialized:
            copied.full, copied.recent = self.full.fork(samples, capacity), self.recent.fork(samples, capacity)
            copied.arrived = self.arrived.new_zeros(len(samples) * self.layer.kv_heads)
            copied._pin()
        return copied

    def select(self, samples: Tensor) -> None:
        """Make sample `samples[i]` the new sample i."""
        if self.is_initialized:
            for store in self.stores:
                store.select(samples)
            count = len(samples) * self.layer.kv_heads
            if len(self.arrived) != count:
                self.arrived = self.arrived.new_zeros(count)
