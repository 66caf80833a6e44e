"""Token eviction on top of a head mask: retrieval heads keep a share of a context's tokens, and the rest is freed."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from numbers import Real

import torch
from torch import Tensor
from transformers import PreTrainedModel

from duo_id.attention.choices import EVICTION_BUDGETS, EVICTION_SCORES
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

    The sink and the latest tokens always stay, the others by a score, each head its own. Streaming heads keep what they
    keep. Positions go on from the end of the text.

    Attributes:
        keep: share of the tokens, above 0 and at most 1; of all heads together if their budget is adaptive.
        score: `kvzip`: what is attended to while the model reads the context again, the best and slowest (Kim et al.
            2025, arXiv 2505.23416); `snapkv`: what the latest queries attend to, averaged over neighbours (Li et al.
            2024, arXiv 2404.14469); `keydiff`: keys that differ from the others (Park et al. 2025, arXiv 2504.15364),
            which needs no queries.
        window: how many of the latest tokens stay; their queries are those of `snapkv`.
        pool: neighbours over which `snapkv` averages, an odd number.
        budget: `uniform`: all heads keep equally many tokens; `adaptive`: the highest scores of all heads of all layers
            stay, so that some heads keep more than others, as in KVzip (and within a layer in Ada-KV, Feng et al. 2024,
            arXiv 2407.11550); None: adaptive, but for `keydiff`, whose scores of different heads do not compare.

    Raises:
        UserError: a value is impossible.
    """

    keep: float
    score: str = "kvzip"
    window: int = 64
    pool: int = 5
    budget: str | None = None

    def __post_init__(self) -> None:
        """Check all values."""
        real = isinstance(self.keep, Real) and not isinstance(self.keep, bool)
        check(real and 0 < self.keep <= 1, f"keep={self.keep!r:.80} must be a share of the tokens, above 0 up to 1")
        check(self.score in EVICTION_SCORES, f"score={self.score!r:.80}: choose one of {', '.join(EVICTION_SCORES)}")
        budgets = (None, *EVICTION_BUDGETS)
        check(self.budget in budgets, f"budget={self.budget!r:.80}: choose one of {', '.join(EVICTION_BUDGETS)}")
        compare = self.budget != "adaptive" or self.score != "keydiff"
        check(compare, "budget=adaptive: scores of keydiff do not compare between heads: use kvzip, or budget=uniform")
        for name in ("window", "pool"):
            value = getattr(self, name)
            whole = isinstance(value, int) and not isinstance(value, bool) and value > 0
            check(whole, f"{name}={value!r:.80} must be a whole number of tokens, at least 1")
        check(self.pool % 2 == 1, f"pool={self.pool} must be odd: a token and as many neighbours on either side")

    @property
    def adaptive(self) -> bool:
        """Whether heads keep unequally many tokens."""
        return self.budget == "adaptive" or (self.budget is None and self.score != "keydiff")

    def kept(self, tokens: int, sink_size: int, heads: int = 1) -> int:
        """How many of `tokens` tokens so many retrieval heads keep, all together."""
        least = heads * min(tokens, sink_size + self.window)
        if self.adaptive:
            return max(least, tokens_within(self.keep, heads * tokens))
        return max(least, heads * tokens_within(self.keep, tokens))


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
    tokens, layers = cache.tokens.held[0], evictable(cache)
    stored = sum(len(layer.full.heads) * (tokens - layer.full.dropped) for layer in layers)
    if how.kept(tokens, cache.mask.sink_size, heads_of(layers)) >= stored:
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
    again = any(layer.full.places is not None for layer in evictable(cache))
    check(not again, "evict: heads of this cache keep unequally many tokens: evict once, or first with budget=uniform")
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
    tokens, sink, layers = cache.tokens.held[0], cache.mask.sink_size, evictable(cache)
    scores = {layer.layer.index: scores[layer.layer.index].clone() for layer in layers}
    for score in scores.values():
        score[..., :sink] = score[..., max(0, score.shape[2] - how.window) :] = torch.inf
    if how.adaptive:
        _evict_together(layers, scores, how.kept(tokens, sink, heads_of(layers)))
    else:
        kept = how.kept(tokens, sink)
        for layer in layers:
            score = scores[layer.layer.index]
            if kept < score.shape[2]:
                layer.evict(score.topk(kept, sorted=False).indices.sort().values)
    cache.tokens.evicted = tokens


def heads_of(layers: Sequence[DualLayer]) -> int:
    """How many retrieval heads layers have."""
    return sum(len(layer.full.heads) for layer in layers)


def _evict_together(layers: Sequence[DualLayer], scores: Scores, kept: int) -> None:
    """Keep the `kept` tokens of highest score of all heads of all layers, in each sample."""
    device = layers[0].full.device
    parts = [scores[layer.layer.index].flatten(1).to(device) for layer in layers]
    everything = torch.cat(parts, 1)
    stays = torch.zeros_like(everything, dtype=torch.bool)
    stays.scatter_(1, everything.topk(kept, sorted=False).indices, True)
    for layer, stay in zip(layers, stays.split([part.shape[1] for part in parts], 1), strict=True):
        layer.evict(stay.view(scores[layer.layer.index].shape).to(layer.full.device))
