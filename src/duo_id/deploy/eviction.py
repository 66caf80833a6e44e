"""Token eviction on top of a head mask: retrieval heads keep a share of a context's tokens, and the rest is freed."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from numbers import Real

import torch
from torch import Tensor
from transformers import PreTrainedModel

from duo_id.attention.choices import EVICTION_SCORES
from duo_id.common.errors import UserError, check
from duo_id.deploy.cache import DualCache
from duo_id.deploy.chunks import continuation
from duo_id.deploy.layer import DualLayer
from duo_id.deploy.token_scores import LatestQueries, Scores, evictable, keydiff, kvzip, snapkv
from duo_id.patterns.allocation import tokens_within

PADDED = "evict: samples of a padded batch would keep different numbers of tokens: read them one by one"


@dataclass(frozen=True)
class Eviction:
    """Which of a context's tokens retrieval heads keep once it is read, for `prefill(..., evict=Eviction(keep=0.5))`.

    The sink and the latest tokens always stay, the others by a score, each head its own; all heads keep equally many.
    Streaming heads keep what they keep. Positions go on from the end of the text.

    Attributes:
        keep: share of the tokens, above 0 and at most 1.
        score: `kvzip`: what is attended to while the model reads the context again, the best and slowest (Kim et al.
            2025, arXiv 2505.23416); `snapkv`: what the latest queries attend to, averaged over neighbours (Li et al.
            2024, arXiv 2404.14469); `keydiff`: keys that differ from the others (Park et al. 2025, arXiv 2504.15364),
            which needs no queries.
        window: how many of the latest tokens stay; their queries are those of `snapkv`.
        pool: neighbours over which `snapkv` averages, an odd number.

    Raises:
        UserError: a value is impossible.
    """

    keep: float
    score: str = "kvzip"
    window: int = 64
    pool: int = 5

    def __post_init__(self) -> None:
        """Check all values."""
        real = isinstance(self.keep, Real) and not isinstance(self.keep, bool)
        check(real and 0 < self.keep <= 1, f"keep={self.keep!r:.80} must be a share of the tokens, above 0 up to 1")
        check(self.score in EVICTION_SCORES, f"score={self.score!r:.80}: choose one of {', '.join(EVICTION_SCORES)}")
        for name in ("window", "pool"):
            value = getattr(self, name)
            whole = isinstance(value, int) and not isinstance(value, bool) and value > 0
            check(whole, f"{name}={value!r:.80} must be a whole number of tokens, at least 1")
        check(self.pool % 2 == 1, f"pool={self.pool} must be odd: a token and as many neighbours on either side")

    def kept(self, tokens: int, sink_size: int) -> int:
        """How many of `tokens` tokens a retrieval head keeps."""
        return max(tokens_within(self.keep, tokens), min(tokens, sink_size + self.window))


@contextmanager
def evicting(model: PreTrainedModel, cache: DualCache, how: Eviction | None, input_ids: Tensor) -> Iterator[None]:
    """A block that reads a text into a cache, and after which tokens are evicted.

    Args:
        model: under a mask.
        cache: its own.
        how: what stays; None: everything.
        input_ids: (batch, tokens), what is read.

    Raises:
        UserError: tokens of this cache cannot be evicted.
    """
    if how is None:
        yield
        return
    check_supported(cache, how)
    latest = LatestQueries(how.window)
    with latest.recorded(cache) if how.score == "snapkv" else nullcontext():
        yield
    tokens, sink = cache.tokens.held[0], cache.mask.sink_size
    if all(how.kept(tokens, sink) >= tokens - layer.full.dropped for layer in evictable(cache)):
        return
    if how.score == "keydiff":
        scores = keydiff(cache)
    elif how.score == "snapkv":
        scores = snapkv(cache, latest, how.pool)
    else:
        continued = continuation(model, input_ids)
        check(not continued.stepwise, "score=kvzip: several tokens cannot follow a past here: use score=snapkv")
        scores = kvzip(model, input_ids, cache, continued)
    evict(cache, scores, how)


def check_supported(cache: DualCache, how: Eviction) -> None:
    """Raise a `UserError` if tokens of a cache cannot be evicted once a text without padding is read into it."""
    check(not cache.coded, "evict: retrieval heads that keep codes cannot drop tokens: use kv=exact")
    tokens = cache.tokens
    check(tokens.lengths is None or (tokens.real is None and len(set(tokens.held)) == 1), PADDED)
    for layer in cache.dual_layers:
        if layer.widened:
            raise UserError(
                f"evict: streaming heads of {layer.layer.name} see all of max_length={cache.max_length}, so they are "
                "kept as retrieval heads are: leave max_length out"
            )
    if how.score != "keydiff" and any(layer.layer.sharers for layer in cache.dual_layers):
        raise UserError(f"score={how.score}: layers of this model share keys: use score=keydiff")
    if how.score == "kvzip":
        begun = int(cache.get_seq_length()) > 0
        check(not begun, "score=kvzip repeats the whole context, but the cache is not empty: use score=snapkv")
        check(cache.max_length is None, "score=kvzip needs a growing cache: leave max_length out")
        stateful = any(not isinstance(layer, DualLayer) for layer in cache.layers)
        check(not stateful, "score=kvzip: layers without attention would keep what is repeated: use score=snapkv")


def evict(cache: DualCache, scores: Scores, how: Eviction) -> None:
    """Let retrieval heads keep the sink, the latest tokens and those of highest score, and free the others' memory.

    Args:
        cache: see `check_supported`.
        scores: see `duo_id.deploy.token_scores`.
        how: how many stay.
    """
    tokens, sink = cache.tokens.held[0], cache.mask.sink_size
    kept = how.kept(tokens, sink)
    for layer in evictable(cache):
        score = scores[layer.layer.index].clone()
        stored = score.shape[2]
        score[..., :sink] = score[..., max(0, stored - how.window) :] = torch.inf
        if kept < stored:
            layer.evict(score.topk(kept, sorted=False).indices.sort().values)
    cache.tokens.evicted = tokens
