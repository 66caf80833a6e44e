"""How much each token of a context is worth to a retrieval head, by scores of token eviction.

All return float32 (batch, retrieval heads, stored tokens) by the layer's index, higher = needed more.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from duo_id.attention.softmax import Softmax
from duo_id.common.compat import cache_argument, keeps_logits
from duo_id.deploy.cache import DualCache
from duo_id.deploy.chunks import Continuation
from duo_id.deploy.layer import DualLayer
from duo_id.patterns.spans import ALL

Scores = dict[int, Tensor]
REPEATED = 2048  # tokens of the context that are repeated at once, as in KVzip's code
ROWS = 64  # queries whose weights are held at the same time


def evictable(cache: DualCache) -> list[DualLayer]:
    """The layers that have retrieval heads."""
    return [layer for layer in cache.dual_layers if layer.is_initialized and len(layer.full.heads)]


def keydiff(cache: DualCache) -> Scores:
    """How little a key looks like the others: minus its cosine with the mean direction of all (arXiv 2504.15364)."""
    scores = {}
    for layer in evictable(cache):
        directions = F.normalize(_stored(layer)[0].float(), dim=-1)
        scores[layer.layer.index] = -F.cosine_similarity(directions, directions.mean(2, keepdim=True), dim=-1)
    return scores


class LatestQueries:
    """The queries of the latest tokens of a cache, layer by layer, recorded while it is read into.

    Args:
        window: how many tokens.
    """

    def __init__(self, window: int) -> None:
        self.window = window
        self.queries: dict[int, Tensor] = {}  # (batch, query heads, at most window, head_dim) by the layer's index
        self.softmax: dict[int, Softmax] = {}

    @contextmanager
    def recorded(self, cache: DualCache) -> Iterator[None]:
        """Record what is read into `cache` in this block."""
        with _observed(cache, self._see):
            yield

    def _see(self, index: int, query: Tensor, softmax: Softmax) -> None:
        latest = query[:, :, -self.window :]
        before = self.queries.get(index, latest[:, :, :0])
        self.queries[index] = torch.cat([before, latest], 2)[:, :, -self.window :].clone()
        self.softmax[index] = softmax


def snapkv(cache: DualCache, latest: LatestQueries, pool: int) -> Scores:
    """What the latest queries attend to, averaged over `pool` neighbours (SnapKV, arXiv 2404.14469).

    Args:
        cache: that was read.
        latest: recorded until its last token.
        pool: tokens, an odd number.
    """
    scores = {}
    for layer in evictable(cache):
        index, (keys, _) = layer.layer.index, _stored(layer)
        queries, softmax = latest.queries[index].unflatten(1, (layer.layer.kv_heads, -1)), latest.softmax[index]
        stored = keys.shape[2]
        at = torch.arange(stored - queries.shape[3], stored, device=keys.device)
        visible = torch.arange(stored, device=keys.device) <= at[:, None]
        summed = torch.zeros(keys.shape[:3], device=keys.device)
        for place, head in enumerate(layer.full.heads):
            of_head = softmax.of([head], layer.layer.kv_heads), keys[:, place : place + 1]
            for rows, seen in zip(queries[:, head].split(ROWS, 2), visible.split(ROWS), strict=True):
                summed[:, place] += of_head[0].weights(rows, of_head[1], seen).sum((1, 2))
        scores[index] = F.avg_pool1d(summed, pool, 1, pool // 2, count_include_pad=False)
    return scores


def kvzip(model: PreTrainedModel, input_ids: Tensor, cache: DualCache, how: Continuation) -> Scores:
    """The largest weight that a token gets while the model reads the context again (KVzip, arXiv 2505.23416).

    The context is repeated in chunks, each after all of it, and a repeated token's weights are those among the sink,
    its chunk of the context and what it repeats before it. The cache is left as it was.

    Args:
        model: under a mask.
        input_ids: (batch, tokens), all that the cache holds.
        cache: growing.
        how: what forwards after a past need.
    """
    past = input_ids.shape[1]
    scores = {layer.layer.index: torch.zeros(_stored(layer)[0].shape[:3]) for layer in evictable(cache)}
    by_index, sink = {layer.layer.index: layer for layer in evictable(cache)}, cache.mask.sink_size

    def see(start: int, end: int, index: int, query: Tensor, softmax: Softmax) -> None:
        layer = by_index[index]
        scores[index] = scores[index].to(query.device)
        slots = torch.arange(past + end - start, device=query.device)
        slots = slots[(slots < sink) | ((slots >= start) & (slots < end)) | (slots >= past)]
        queries = query.unflatten(1, (layer.layer.kv_heads, -1))
        at = past + torch.arange(end - start, device=query.device)
        for place, head in enumerate(layer.full.heads):
            of_head, keys = softmax.of([head], layer.layer.kv_heads), layer.full.key[:, place : place + 1, slots]
            for rows, positions in zip(queries[:, head].split(ROWS, 2), at.split(ROWS), strict=True):
                weights = of_head.weights(rows, keys, slots <= positions[:, None]).amax((1, 2))
                inside = slots < past
                found = scores[index][:, place]
                found[:, slots[inside]] = torch.maximum(found[:, slots[inside]], weights[:, inside])

    options = {"logits_to_keep": 1} if keeps_logits(model) else {}
    for start in range(0, past, REPEATED):
        ids = input_ids[:, start : start + REPEATED]
        with _undone(cache), _observed(cache, partial(see, start, start + ids.shape[1])):
            model(ids, use_cache=True, **{cache_argument(model): cache}, **options, **how.options(ids, past))
    return scores


def _stored(layer: DualLayer) -> tuple[Tensor, Tensor]:
    """Keys and values (batch, retrieval heads, stored tokens, head_dim) of a layer."""
    stored = layer.tokens.held[0] - layer.full.dropped
    return layer.full.key[:, :, :stored], layer.full.value[:, :, :stored]


@contextmanager
def _observed(cache: DualCache, see: Callable[[int, Tensor, Softmax], None]) -> Iterator[None]:
    """Show the queries of all layers with retrieval heads, after the layer's index, to `see` for a block."""
    layers = [layer for layer in cache.dual_layers if ALL in layer.spans]
    for layer in layers:
        layer.observer = partial(see, layer.layer.index)
    try:
        yield
    finally:
        for layer in layers:
            layer.observer = None


@contextmanager
def _undone(cache: DualCache) -> Iterator[None]:
    """Take back at the end of the block what was read in it; only the room for retrieval heads may have grown."""
    layers, tokens = cache.dual_layers, cache.tokens
    everyone = torch.arange(len(layers[0].full.key))
    streaming, counts = [layer.recent.fork(everyone) for layer in layers], vars(tokens.fork(everyone))
    try:
        yield
    finally:
        for layer, before in zip(layers, streaming, strict=True):
            layer.recent = before
        vars(tokens).update(counts)
