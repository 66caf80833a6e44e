"""What is compared: full attention over transformers' static cache, and a head mask over the dual cache.

The dual cache with retrieval heads only is a second full contender; the faster of the two is the baseline.
"""

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager
from typing import Any

import torch
from transformers import Cache, StaticCache
from transformers.cache_utils import StaticLayer

from duo_id.attention.layers import AttentionLayer
from duo_id.benchmark import static_attention
from duo_id.common.errors import UserError
from duo_id.deploy.cache import DualCache
from duo_id.deploy.install import dual_cache, duo_attention
from duo_id.models.language_model import LanguageModel
from duo_id.patterns.mask import HeadMask
from duo_id.patterns.spans import HeadSpans


class CacheContender(ABC):
    """One way to attend, with its cache.

    Args:
        language_model: the model.
        layers: its attention layers.
        batch: samples.

    Attributes:
        name: in rows and figures, see `duo_id.benchmark.tables`.
        mask: how far each head sees; None: all tokens.
        kv: what heads keep that see all tokens; see `DualCache`.
    """

    name: str
    mask: HeadMask | HeadSpans | None = None
    kv: str = "exact"

    def __init__(self, language_model: LanguageModel, layers: list[AttentionLayer], batch: int) -> None:
        self.model, self.layers, self.batch = language_model.model, layers, batch

    @property
    def sparsity(self) -> float:
        """Fraction of the KV heads that stream."""
        if self.mask is None:
            return 0.0
        gated = self.mask.retrieval[list(self.mask.gated_layers)]
        return 1 - int(gated.sum()) / gated.numel()

    @abstractmethod
    def installed(self) -> AbstractContextManager[None]:
        """A context in which the model attends this way."""

    @abstractmethod
    def new_cache(self, slots: int) -> Cache:
        """An empty static cache with memory for `slots` tokens per sample."""

    @abstractmethod
    def fill(self, cache: Cache, tokens: int, seed: int = 0) -> None:
        """Fill a cache with random tokens, replacing its contents."""

    @abstractmethod
    def clear(self, cache: Cache) -> None:
        """Empty a cache."""

    @abstractmethod
    def nbytes(self, cache: Cache) -> int:
        """Bytes of keys and values."""

    def choose_backend(self, cache: Cache, context: int) -> str:
        """Choose the backend of a decode step after `context` tokens, and return its name."""
        return "triton" if self.model.device.type == "cuda" else "reference"

    def set_position(self, context: int) -> None:  # noqa: B027  (most count on the device alone)
        """Make the next decode step one after `context` tokens, where the host counts them."""


class StaticAttention(CacheContender):
    """Full attention by SDPA over a `StaticCache`."""

    name = "full"

    def installed(self) -> AbstractContextManager[None]:
        """See `CacheContender`."""
        return static_attention.full_attention_installed(self.model, self.layers)

    def new_cache(self, slots: int) -> Cache:
        """See `CacheContender`."""
        cache = StaticCache(self.model.config, max_cache_len=slots)
        heads, dims = ([getattr(layer, key) for layer in self.layers] for key in ("kv_heads", "head_dim"))
        cache.early_initialization(self.batch, heads, dims, self.model.dtype, self.model.device)
        return cache

    def fill(self, cache: Cache, tokens: int, seed: int = 0) -> None:
        """See `CacheContender`."""
        generator = torch.Generator(self.model.device).manual_seed(seed)
        for layer in _static_layers(cache):
            layer.keys.normal_(generator=generator)
            layer.values.normal_(generator=generator)
            layer.cumulative_length.fill_(tokens)
        self.set_position(tokens)

    def clear(self, cache: Cache) -> None:
        """See `CacheContender`."""
        cache.reset()
        self.set_position(0)

    def nbytes(self, cache: Cache) -> int:
        """See `CacheContender`."""
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in _static_layers(cache))

    def set_position(self, context: int) -> None:
        """See `CacheContender`."""
        static_attention.host.tokens = context

    def choose_backend(self, cache: Cache, context: int) -> str:
        """See `CacheContender`."""
        first = _static_layers(cache)[0]
        return "sdpa " + static_attention.choose_backend(self.layers[0], first.keys, first.values, context + 1)


class DualAttention(CacheContender):
    """A head mask over the dual cache, as deployed.

    Args:
        language_model: the model.
        layers: its attention layers.
        batch: samples.
        mask: how far each head sees.
        name: in rows and figures.
        kv: what retrieval heads keep; see `DualCache`.
    """

    def __init__(
        self,
        language_model: LanguageModel,
        layers: list[AttentionLayer],
        batch: int,
        mask: HeadMask | HeadSpans,
        name: str = "duo",
        kv: str = "exact",
    ) -> None:
        super().__init__(language_model, layers, batch)
        self.mask, self.name, self.kv = mask, name, kv

    def installed(self) -> AbstractContextManager[None]:
        """See `CacheContender`."""
        assert self.mask is not None
        return duo_attention(self.model, self.mask, kv=self.kv)

    def new_cache(self, slots: int) -> Cache:
        """See `CacheContender`."""
        return dual_cache(self.model, max_length=slots)

    def fill(self, cache: Cache, tokens: int, seed: int = 0) -> None:
        """See `CacheContender`."""
        assert isinstance(cache, DualCache)
        cache.fill(self.batch, tokens, self.model.dtype, self.model.device, seed)

    def clear(self, cache: Cache) -> None:
        """See `CacheContender`."""
        cache.reset()

    def nbytes(self, cache: Cache) -> int:
        """See `CacheContender`."""
        assert isinstance(cache, DualCache)
        return cache.nbytes


def _static_layers(cache: Cache) -> list[Any]:
    if any(type(layer) is not StaticLayer for layer in cache.layers):
        raise UserError("the config asks for other types of cache: +model.config.sliding_window=null may help")
    return list(cache.layers)
