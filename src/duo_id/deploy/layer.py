"""One layer of the dual cache, and what it hands to the model."""

import copy
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from duo_id.attention.decode import decode_attention
from duo_id.attention.heads import Backends
from duo_id.attention.masks import Window
from duo_id.attention.probe import AttentionLayer
from duo_id.attention.softmax import Softmax
from duo_id.deploy.stores import FullStore, Store, StreamingStore
from duo_id.deploy.tokens import Tokens
from duo_id.errors import UserError


class DualLayer(CacheLayerMixin):
    """One layer of the cache: a full store for its retrieval heads, a streaming store for the others.

    Args:
        layer: the attention layer.
        retrieval: (KV heads,) bool.
        window: what its streaming heads see.
        tokens: shared by the layers of a cache.
        leads: whether it is the first layer of a forward, which counts the tokens.
        capacity: slots of the full store; None for one that grows.
        backends: attention implementations of prefill.
    """

    is_sliding = False
    is_croppable = False  # not beyond the window, in general

    def __init__(
        self,
        layer: AttentionLayer,
        retrieval: Tensor,
        window: Window,
        tokens: Tokens,
        leads: bool,
        capacity: int | None,
        backends: Backends,
    ) -> None:
        super().__init__()
        self.layer, self.retrieval, self.window, self.tokens = layer, retrieval, window, tokens
        self.leads, self.capacity, self.backends = leads, capacity, backends
        self.is_compileable = capacity is not None
        self.full: FullStore
        self.recent: StreamingStore

    @torch.inference_mode(False)  # so that the cache serves outside such a block too
    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Make the stores, empty, for keys like `key_states` (batch, KV heads, any, head_dim)."""
        device = key_states.device
        if self.tokens.lengths is None:
            self.tokens.start(len(key_states), device)
        full, streaming = (x.nonzero()[:, 0].tolist() for x in (self.retrieval, ~self.retrieval))
        self.full = FullStore(key_states, full, self.capacity, self.backends.full)
        self.recent = StreamingStore(key_states, streaming, self.window, self.backends.streaming)
        self.heads = torch.tensor(full + streaming, dtype=torch.int32, device=device)
        self.arrived = torch.zeros(key_states.shape[:2].numel(), dtype=torch.int32, device=device)
        if self.is_compileable and not torch.compiler.is_compiling():
            for store in self.stores:
                torch._dynamo.mark_static_address(store.key)
                torch._dynamo.mark_static_address(store.value)
            torch._dynamo.mark_static_address(self.arrived)
        self.is_initialized = True

    def update(  # type: ignore[override]
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple["ArrivingKeys", Tensor]:
        """Take new keys and values (batch, KV heads, tokens, head_dim), to be stored when their queries attend."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if len(key_states) != len(self.full.key):
            raise UserError(
                f"the cache holds {len(self.full.key)} samples, but {len(key_states)} came: use a new cache for them"
            )
        return ArrivingKeys(self, key_states, value_states), value_states

    @torch.no_grad()
    def attend(self, query: Tensor, key: Tensor, value: Tensor, softmax: Softmax) -> Tensor:
        """Store new tokens and attend from them; see `ArrivingKeys.attend`."""
        tokens, new = self.tokens, key.shape[2]
        if self.leads:
            tokens.advance(new, self.capacity)
        query, key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value))
        if self.capacity is None:
            self.full.reserve(tokens.most)
        if new == 1:
            assert tokens.reach is not None
            window, lengths = self.window, tokens.reach.to(query.device)
            places = (self.full.key, self.full.value, self.recent.key, self.recent.value, self.heads, lengths)
            return decode_attention(
                query,
                key,
                value,
                *places,
                self.arrived,
                window.sink_size,
                window.recent_size,
                softmax.factor(query.shape[-1]),
                softmax.softcap,
                softmax.sinks,
            )
        # Tokens before heads in memory, which is how the model goes on; nothing else writes where there is padding.
        whole = tokens.uniform and tokens.spans[0] == (0, new)
        make = torch.empty if whole else torch.zeros
        batch, heads, _, dim = query.shape
        out = make(batch, new, heads, dim, dtype=query.dtype, device=query.device).transpose(1, 2)
        samples = [slice(None)] if tokens.uniform else [slice(i, i + 1) for i in range(batch)]
        for sample, past, (start, end) in zip(samples, tokens.past, tokens.spans, strict=False):
            part = (sample, slice(None), slice(start, end))
            for store in self.stores:
                if store.heads and end > start:
                    store.attend(query[part], key[part], value[part], out[part], past, sample, softmax)
        return out

    @property
    def stores(self) -> tuple[Store, Store]:
        """Both stores."""
        return self.full, self.recent

    @property
    def batch_size(self) -> int:
        """Samples in the cache; -1 before the first forward."""
        return len(self.full.key) if self.is_initialized else -1

    @property
    def nbytes(self) -> int:
        """Bytes that both stores hold."""
        return sum(store.nbytes for store in self.stores) if self.is_initialized else 0

    def retained_bytes(self, tokens: int) -> int:
        """Bytes of what one sample of `tokens` tokens keeps."""
        if not self.is_initialized:
            return 0
        window = min(tokens, self.window.sink_size + self.window.recent_size)
        entries = len(self.full.heads) * tokens + len(self.recent.heads) * window
        return 2 * entries * self.layer.head_dim * self.full.key.element_size()

    def get_seq_length(self) -> int:
        """Tokens that went in, padding among them."""
        return self.tokens.seen if self.is_initialized else 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Keys that a mask for the next `query_length` tokens covers, and where it begins."""
        if self.capacity is not None:
            return self.capacity, 0
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        """Most tokens, -1 for no limit."""
        return -1 if self.capacity is None else self.capacity

    def reset(self) -> None:
        """Forget all tokens; a growing layer gives its memory back."""
        if self.capacity is None:
            self.is_initialized = False
            self.__dict__.pop("full", None), self.__dict__.pop("recent", None)

    def fork(self, samples: Tensor, tokens: Tokens) -> "DualLayer":
        """A layer of its own with the samples `samples[i]`, counted by `tokens`."""
        twin = copy.copy(self)
        twin.tokens = tokens
        if self.is_initialized:
            twin.full, twin.recent = self.full.fork(samples), self.recent.fork(samples)
            twin.arrived = self.arrived.new_zeros(len(samples) * self.layer.kv_heads)
        return twin

    def select(self, samples: Tensor) -> None:
        """Make sample `samples[i]` the new sample i."""
        if self.is_initialized:
            for store in self.stores:
                store.select(samples)
            count = len(samples) * self.layer.kv_heads
            if len(self.arrived) != count:
                self.arrived = self.arrived.new_zeros(count)


class ArrivingKeys:
    """What the cache hands the model in place of keys: the new tokens' keys, with the layer that will store them."""

    def __init__(self, layer: DualLayer, key: Tensor, value: Tensor) -> None:
        self.layer, self.key, self.value = layer, key, value

    def __getattr__(self, name: str) -> Any:
        """Nothing else: a model that works on its keys after the cache has taken them cannot use this one."""
        if name.startswith("__"):
            raise AttributeError(name)
        raise UserError("this model changes its keys behind the cache, which the dual cache does not: use_cache=False")

    def attend(self, module: torch.nn.Module, query: Tensor, softmax: Softmax) -> Tensor:
        """Store the tokens and attend from them to all that the layer's heads see.

        Args:
            module: the attention module that asks.
            query: (batch, heads, tokens, head_dim).
            softmax: of the layer.

        Returns:
            (batch, heads, tokens, head_dim); zeros for padding.

        Raises:
            UserError: another layer asks, in a model whose layers share keys.
        """
        if module is not self.layer.layer.module:
            raise UserError(
                "layers of this model share keys and values, which the dual cache does not: use_cache=False"
            )
        return self.layer.attend(query, self.key, self.value, softmax)
