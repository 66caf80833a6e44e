"""The dual KV cache: a transformers `Cache` whose layers store retrieval and streaming heads separately."""

import copy
import operator
from collections.abc import Sequence
from typing import cast

import torch
from torch import LongTensor, Tensor
from transformers import Cache, PreTrainedConfig
from transformers.cache_utils import LinearAttentionCacheLayerMixin

from duo_id.attention import codes
from duo_id.attention.codes import Kv
from duo_id.attention.functions import Backends, Mask
from duo_id.attention.layers import AttentionLayer
from duo_id.common.compat import cache_layers
from duo_id.common.errors import UserError
from duo_id.deploy.counts import Tokens
from duo_id.deploy.layer import DualLayer

DRAFTED = 128  # tokens that assisted generation can remove again


class DualCache(Cache):
    """Keys and values under a head mask: all tokens for retrieval heads, sink and latest tokens for streaming heads.

    Layers with a sliding window keep that window, like streaming heads without a sink; layers without attention keep
    the state that transformers gives them. After T tokens a cache for B samples holds
    `2 * B * head_dim * bytes per number * sum over heads of (T, or min(T, sink + span))` bytes, and a growing one up to
    1/128 or 64 tokens a head of slack. Source: DuoAttention, section 2.3, where all streaming heads have one span.
    Retrieval heads may keep codes of 8 or 4 bits in place of numbers; see `duo_id.deploy.quantised`.

    Args:
        layers: all attention layers of the model.
        mask: how far each head sees: a `HeadMask` or `HeadSpans`.
        config: of the (text) model.
        max_length: tokens to make room for, in a static cache that can be compiled and captured; None: it grows.
        backends: attention implementations of prefill.
        kv: what retrieval heads keep: `exact` is the model's own type, `int8`, `int4` and `k8v4` are codes of so many
            bits, the last of 8 for keys and 4 for values. Or one of these for each layer of the model.

    Raises:
        UserError: a layer has its own attention pattern, or other state in addition to keys and values; or no codes of
            its keys can be packed.
    """

    def __init__(
        self,
        layers: Sequence[AttentionLayer],
        mask: Mask,
        config: PreTrainedConfig,
        max_length: int | None = None,
        backends: Backends | None = None,
        kv: Kv = "exact",
    ) -> None:
        self.mask, self.max_length, self.tokens = mask, max_length, Tokens(max_length is not None)
        self.kv, bits = kv, codes.bits_by_layer(kv, config.num_hidden_layers)
        if max_length is not None and max_length < 1:
            raise UserError(f"max_length={max_length} must be at least 1 token")
        all_layers = cache_layers(config, max_length)
        first, all_spans = min(layer.index for layer in layers), mask.spans.tolist()
        for layer in layers:
            if layer.index >= len(all_layers):
                continue  # an early-exit model does not run it
            if layer.obstacle or isinstance(all_layers[layer.index], LinearAttentionCacheLayerMixin):
                raise UserError(f"{layer.name} cannot use a dual cache: {layer.obstacle or 'it also has other state'}")
            if bits[layer.index] and layer.head_dim % 2:
                raise UserError(
                    f"codes are packed in two halves, but heads of {layer.name} are {layer.head_dim} wide, an odd "
                    "number: use kv=exact"
                )
            spans, sink_size = all_spans[layer.index], mask.sink_size
            if layer.window is not None:
                spans, sink_size = [layer.window] * layer.kv_heads, 0
            all_layers[layer.index] = DualLayer(
                layer,
                spans,
                sink_size,
                self.tokens,
                layer.index == first,
                max_length,
                backends or Backends(),
                bits[layer.index],
            )
        super().__init__(layers=all_layers)

    @property
    def dual_layers(self) -> list[DualLayer]:
        """The layers with attention."""
        return [layer for layer in self.layers if isinstance(layer, DualLayer)]

    @property
    def coded(self) -> bool:
        """Whether retrieval heads of any layer keep codes."""
        return any(layer.bits is not None for layer in self.dual_layers)

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values that the cache holds, including free slots."""
        return sum(layer.nbytes for layer in self.dual_layers)

    @property
    def retained_bytes(self) -> int:
        """Bytes of keys and values that the longest sample keeps, without free slots."""
        return self.bytes_of(max(self.tokens.held, default=0) if self.tokens.lengths is not None else 0)

    def bytes_of(self, tokens: int) -> int:
        """Bytes of keys and values that a sample of so many tokens keeps, whatever the cache holds now."""
        return sum(layer.retained_bytes(tokens) for layer in self.dual_layers)

    @property
    def max_cache_len(self) -> int:
        """Capacity in tokens; -1 for no limit. Newer name of transformers' `get_max_length`."""
        return self.get_max_length()

    def offload(self, layer_idx: int | None = None, only_non_sliding: bool = False) -> None:
        """Move keys and values of one layer, or of all layers, to the CPU until `prefetch`."""
        for layer in self.layers if layer_idx is None else [self.layers[layer_idx]]:
            layer.offload()

    def prefetch(self, layer_idx: int | None = None, only_non_sliding: bool = False) -> None:
        """Move back to the device what `offload` has moved away; required before the next forward."""
        for layer in self.layers if layer_idx is None else [self.layers[layer_idx]]:
            layer.prefetch()

    @property
    def is_croppable(self) -> bool:
        """Whether the last tokens can be removed at any length."""
        return all(getattr(layer, "is_croppable", False) for layer in self.layers)

    def bind(self, layers: Sequence[AttentionLayer]) -> None:
        """Attach a cache that was loaded from a file to a model, given the model's attention layers."""
        by_index = {layer.index: layer for layer in layers}
        for index, layer in enumerate(self.layers):
            if isinstance(layer, DualLayer):
                layer.layer = by_index[index]

    def fork(self, samples: Tensor, max_length: int | None = None) -> "DualCache":
        """An independent cache whose sample i is this one's `samples[i]` (n,) int64.

        Args:
            samples: of this cache, in any order and number.
            max_length: tokens to make room for in a static cache, those read so far included, whatever was evicted;
                None: it grows, and keeps the room that there is.

        Raises:
            UserError: this cache is static and keeps streaming heads as retrieval heads; or it keeps tokens to remove,
                or holds more than `max_length`, and the fork is to be static.
        """
        if any(layer.widened for layer in self.dual_layers):
            raise UserError(
                f"fork: streaming heads see all of max_length={self.max_length}, so they are kept as retrieval heads "
                "are: make the cache without max_length"
            )
        if max_length is not None:
            held = max(self.tokens.held, default=0) if self.tokens.lengths is not None else 0
            if not isinstance(max_length, int) or isinstance(max_length, bool) or max_length < max(held, 1):
                raise UserError(f"fork: max_length={max_length!r} must be a number of tokens, at least {max(held, 1)}")
            if self.tokens.recorded:
                raise UserError("fork: a static cache cannot keep tokens beyond its windows: leave max_length out")
        copied = copy.copy(self)
        copied.max_length, copied.tokens = max_length, self.tokens.fork(samples, max_length is not None)
        copied.layers = [
            layer.fork(samples, copied.tokens, max_length) if isinstance(layer, DualLayer) else copy.deepcopy(layer)
            for layer in self.layers
        ]
        for layer in copied.layers:
            if not isinstance(layer, DualLayer):
                layer.reorder_cache(cast(LongTensor, samples))
        return copied

    def reset(self) -> None:
        """Forget all tokens."""
        for layer in self.layers:
            layer.reset()
        self.tokens.reset()

    def activate_past_recording(self, tokens: int = DRAFTED) -> None:
        """From now on also keep `tokens` tokens beyond streaming heads' windows, so that `crop` can remove as many.

        `generate` calls it for assisted generation and prompt lookup. Decode steps then run as chunks of one token.
        """
        if not isinstance(tokens, int) or isinstance(tokens, bool) or tokens < 1:
            raise UserError(f"activate_past_recording({tokens!r}): pass a whole number of tokens, at least 1")
        if self.tokens.recorded >= tokens:
            return
        if self.max_length is not None:
            raise UserError("a static cache cannot keep tokens beyond its windows: make it without max_length")
        if self.coded and tokens > codes.GROUP:
            raise UserError(
                f"activate_past_recording({tokens}): with codes at most {codes.GROUP} tokens can be removed: ask for "
                "no more, or use kv=exact"
            )
        self.tokens.recorded, self.tokens.since = tokens, self.tokens.highest if self.tokens.lengths is not None else []
        for layer in self.dual_layers:
            layer.record()

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last `-tokens_to_remove` tokens of each sample, columns of padding included.

        Raises:
            UserError: a streaming head would need tokens that it has dropped, or a retrieval head tokens of which it
                keeps only codes; the cache is left unchanged.
        """
        try:
            tokens_to_remove = operator.index(tokens_to_remove)  # some releases pass a tensor
        except TypeError:
            raise UserError(f"crop({tokens_to_remove!r}): pass the number of tokens as a negative number") from None
        tokens, columns = self.tokens, -tokens_to_remove
        if columns < 0:
            raise UserError(f"crop({tokens_to_remove}): pass the number of tokens to remove as a negative number")
        if tokens.lengths is None or columns == 0:
            return
        if columns > int(tokens.seen):
            raise UserError(f"crop({tokens_to_remove}): a sample has only {int(tokens.seen)} tokens")
        if any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in self.layers):
            raise UserError("crop: the state of layers without attention cannot be rolled back")
        lengths, removed = tokens.held, tokens.removed(columns)
        floors, peaks = tokens.floors, tokens.highest
        for length, num_removed, peak in zip(lengths, removed, tokens.highest, strict=True):
            least = max((layer.full.exact_from(peak) for layer in self.dual_layers), default=0)
            if num_removed and length - num_removed < least:
                raise UserError(
                    f"crop({tokens_to_remove}): the first {least} of {peak} tokens are kept as codes alone: crop to no "
                    "fewer, or use kv=exact"
                )
            if num_removed and length - num_removed < tokens.evicted:
                raise UserError(
                    f"crop({tokens_to_remove}): tokens of the first {tokens.evicted} were evicted: crop to no fewer, "
                    "or start with a new cache"
                )
        streaming = [layer.recent for layer in self.dual_layers if len(layer.recent.heads)]
        windows = {ring.window for store in streaming for ring in store.rings}
        for length, num_removed, floor, peak in zip(lengths, removed, floors, peaks, strict=True):
            lost = [window for window in windows if peak > window.sink_size + window.recent_size]
            if lost and num_removed and length - num_removed < floor:
                smallest = min(window.recent_size for window in lost)
                raise UserError(
                    f"crop({tokens_to_remove}): streaming heads keep only the last {smallest} of {peak} tokens: crop "
                    "one token, or start with a new cache, or call cache.activate_past_recording() before adding "
                    "tokens that may be removed"
                )
        for store in streaming:
            for sample, (length, num_removed, floor) in enumerate(zip(lengths, removed, floors, strict=True)):
                store.restore(length, num_removed, floor, sample)
        tokens.remove(columns)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Make sample `beam_idx[i]` (batch,) int64 the new sample i, as beam search does."""
        self._select(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the samples `indices` (n,) int64 or (batch,) bool."""
        self._select(indices.nonzero()[:, 0] if indices.dtype == torch.bool else indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each sample."""
        if self.tokens.lengths is not None:
            self._select(torch.arange(len(self.tokens.lengths)).repeat_interleave(repeats))

    def fill(self, batch: int, tokens: int, dtype: torch.dtype, device: torch.device | str, seed: int = 0) -> None:
        """Fill an empty cache with `tokens` random tokens per sample, for benchmarks of decoding.

        Args:
            batch: number of samples.
            tokens: tokens of each.
            dtype: of keys and values.
            device: of keys and values.
            seed: of the random numbers.
        """
        device = torch.device(device)
        generator = torch.Generator(device).manual_seed(seed)
        self.reset()
        for layer in self.dual_layers:
            if not layer.is_initialized:
                like = torch.empty(batch, layer.layer.kv_heads, 0, layer.layer.head_dim, dtype=dtype, device=device)
                layer.lazy_initialization(like, like)
        self.tokens.mask = None
        self.tokens.advance(tokens, self.max_length)
        for layer in self.dual_layers:
            for store in layer.stores:
                store.reserve(tokens)
                store.fill(generator)
        self.tokens.running = False

    def _select(self, samples: Tensor) -> None:
        for layer in self.layers:
            if isinstance(layer, DualLayer):
                layer.select(samples)
            else:
                layer.reorder_cache(cast(LongTensor, samples))
        self.tokens.select(samples)
