"""What an evaluation compares: the full cache, masks of head patterns, and baselines at the same bytes."""

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import Any

from duo_id.common.errors import UserError
from duo_id.common.foreign import describe_weights
from duo_id.deploy.eviction import Eviction
from duo_id.evaluate.items import Item
from duo_id.patterns.allocation import least_share, tokens_within
from duo_id.patterns.mask import HeadMask
from duo_id.patterns.pattern import HeadPattern, TieWarning
from duo_id.patterns.random_masks import random_like, random_pattern
from duo_id.patterns.spans import HeadSpans
from duo_id.report.rows import ASKED
from duo_id.report.summary import SEED

Key = tuple[str, str, float | None, int | None, float | None]  # the columns `ASKED`
Decision = HeadMask | HeadSpans
EVEN = 0.5  # split of a share between a mask and token eviction
LATEST = 64  # tokens that always stay, or half of what a head keeps


@dataclass(frozen=True)
class Contender:
    """One way of keeping the KV cache.

    Attributes:
        kind: full | pattern | spans | baseline | eviction.
        heads: its name.
        sparsity: fraction of the gated KV heads that stream; for a baseline, the sparsity whose bytes it matches. None
            where a share of the cache is asked.
        seed: of a random mask.
        cache: share of the full cache's bytes that it keeps of each context; None where a sparsity is asked.
        note: a remark for readers of the results.
        mask: returns its mask or spans for a context length in tokens; None where duo_id does not run it.
        kv: what its retrieval heads keep, see `DualCache`; the name says it too.
        evict: returns which tokens retrieval heads keep of a context length in tokens; None: all of them.
    """

    kind: str
    heads: str
    sparsity: float | None = None
    seed: int | None = None
    cache: float | None = None
    note: str = ""
    mask: Callable[[int], Decision] | None = None
    kv: str = "exact"
    evict: Callable[[int], Eviction] | None = None

    @property
    def key(self) -> Key:
        """Its identity: no two contenders share one."""
        return self.kind, self.heads, self.sparsity, self.seed, self.cache

    def describe(self) -> dict[str, Any]:
        """Everything but the mask, as plain values."""
        return {name: getattr(self, name) for name in (*ASKED, "note")}


def contenders(
    patterns: Mapping[str, HeadPattern],
    sparsities: Sequence[float],
    random_masks: int,
    baselines: Sequence[str],
    seed: int,
    caches: Sequence[float] = (),
    kvs: Sequence[str] = ("exact",),
    scores: Sequence[str] = (),
    splits: Sequence[float] = (0.5,),
) -> list[Contender]:
    """Everything that is compared, full attention first.

    A share of the cache is that of each context: masks, spans and windows depend on its length. Where a context is so
    short that the pattern's window takes more than the share, the window is what they keep.

    Args:
        patterns: by name; baselines take their windows and budgets from the first.
        sparsities: of their masks.
        random_masks: number at each sparsity and share of the cache.
        baselines: `streaming`: every head keeps the sink and as many recent tokens as the bytes of a mask allow
            (StreamingLLM, Xiao et al. 2023, arXiv 2309.17453); `window`: recent tokens only. Both match the bytes of
            each sparsity, and at sparsity 1 use the pattern's own window.
        seed: of the first random mask.
        caches: shares of the cache at which the masks of patterns, the spans of those that have needs, random masks and
            baselines are compared, besides `sparsities`.
        kvs: what retrieval heads keep: all of that for `exact`, and once more for each other format, but for baselines.
        scores: of token eviction: masks of patterns that keep a share c of the cache together with it, each score with
            the budgets of heads that are its default.
        splits: how much of that is the mask's: it keeps c^split of the cache, and eviction the rest of what it keeps.
    """
    first = next(iter(patterns.values()))
    lineup = [Contender("full", "full", 0.0, mask=_constant_mask(first.binarize(sparsity=0)))]
    for name, pattern in patterns.items():
        window = f"sink {pattern.sink_size}, recent {pattern.recent_size}"
        for sparsity in sparsities:
            mask = pattern.binarize(sparsity=sparsity)
            lineup.append(Contender("pattern", name, sparsity, note=window, mask=_constant_mask(mask)))
    for sparsity in sparsities:
        for mask_seed in range(seed, seed + random_masks):
            mask = random_like(first, sparsity, mask_seed)
            lineup.append(Contender("baseline", "random", sparsity, mask_seed, mask=_constant_mask(mask)))
    for name in baselines:
        sink = first.sink_size if name == "streaming" else 0
        for sparsity in sorted({*sparsities, 1.0} if sparsities else ()):
            note = f"sink {sink}, plus as many recent tokens as the bytes allow"
            mask_for_length = partial(_mask_of_equal_bytes, first, sparsity, sink)
            lineup.append(Contender("baseline", name, sparsity, note=note, mask=mask_for_length))
    for cache in caches:
        lineup += _at_a_share(patterns, cache, range(seed, seed + random_masks), baselines)
        for name, pattern in patterns.items():
            lineup += [_evicting(name, pattern, cache, score, split) for score in scores for split in splits]
    chosen = [contender for contender in lineup if "exact" in kvs or contender.kind in ("full", "baseline")]
    coded = [contender for contender in lineup if contender.kind != "baseline" and contender.evict is None]
    return chosen + [_keeping(contender, kv) for kv in kvs if kv != "exact" for contender in coded]


def _evicting(name: str, pattern: HeadPattern, cache: float, score: str, split: float) -> Contender:
    """A mask whose retrieval heads keep some tokens; a split other than even is in its name."""
    base, *number = name.split(SEED)
    heads = SEED.join([f"{base} + {score}" + ("" if split == EVEN else f" {split:g}"), *number])
    note = f"sink {pattern.sink_size}, recent {pattern.recent_size}: the mask keeps {cache**split:.3g} of the cache, "
    note += f"of which {score} keeps {cache ** (1 - split):.3g} once the context is read"
    mask = partial(_mask_of_share, pattern, cache**split)
    evict = partial(_eviction_to_share, mask, cache, score)
    return Contender("pattern", heads, cache=cache, note=note, mask=mask, evict=evict)


def _eviction_to_share(mask_for: Callable[[int], HeadMask], cache: float, score: str, tokens: int) -> Eviction:
    """What retrieval heads keep of a context of `tokens` tokens so that all heads keep a share of it, on average.

    Budgets are adaptive where scores compare between heads.
    """
    mask = mask_for(tokens)
    gated = mask.retrieval[list(mask.gated_layers)]
    retrieval, window = int(gated.sum()), min(tokens, mask.sink_size + mask.recent_size)
    budget = tokens_within(cache, gated.numel() * tokens) - (gated.numel() - retrieval) * window
    kept = min(tokens, max(budget // max(1, retrieval), mask.sink_size + 1))  # of each head, or on average
    latest = max(1, min(LATEST, (kept - mask.sink_size) // 2))
    how = Eviction(1.0, score, latest)
    share = max(kept / tokens, budget / (tokens * max(1, retrieval)) if how.adaptive else 0)
    return replace(how, keep=min(1.0, math.nextafter(share, 1)))  # rounded up: the share of all of them


def _keeping(contender: Contender, kv: str) -> Contender:
    """The same mask, whose retrieval heads keep codes; full attention is a baseline then."""
    base, *number = contender.heads.split(SEED)
    name = SEED.join([f"{base} {kv}", *number])
    kind = "baseline" if contender.kind == "full" else contender.kind
    note = ", ".join(filter(None, [contender.note, f"keys and values as {kv}"]))
    return replace(contender, kind=kind, heads=name, note=note, kv=kv)


def _at_a_share(
    patterns: Mapping[str, HeadPattern], cache: float, seeds: Sequence[int], baselines: Sequence[str]
) -> Iterator[Contender]:
    """The contenders that keep a share of the cache; see `contenders`."""
    first = next(iter(patterns.values()))
    for name, pattern in patterns.items():
        window = f"sink {pattern.sink_size}, recent {pattern.recent_size}"
        if pattern.needs is not None:
            spans = ", ".join(map(str, pattern.needs.levels[:-1]))
            note = f"sink {pattern.sink_size}, and for each head {spans} or all tokens, by what it needs"
            yield Contender("spans", name, cache=cache, note=note, mask=partial(_spans_of_share, pattern, cache))
        yield Contender("pattern", name, cache=cache, note=window, mask=partial(_mask_of_share, pattern, cache))
    for seed in seeds:
        mask = partial(_mask_of_share, random_pattern(first, seed), cache)
        yield Contender("baseline", "random", cache=cache, seed=seed, mask=mask)
    for name in baselines:
        sink = first.sink_size if name == "streaming" else 0
        note = f"sink {sink}, plus as many recent tokens as the bytes allow"
        window_of_share = partial(_window_of_share, first, cache, sink)
        yield Contender("baseline", name, cache=cache, note=note, mask=window_of_share)


def kept_tokens(sparsity: float, tokens: int, window: int) -> int:
    """Tokens each head may keep: the average that a mask of `sparsity` keeps out of `tokens`, at least a window."""
    return round((1 - sparsity) * max(tokens, window) + sparsity * window)


def check_windows(patterns: Mapping[str, HeadPattern], items: Sequence[Item]) -> None:
    """Raise a `UserError` if no context is longer than a window: every mask would be full attention."""
    longest = max(len(item.context) for item in items)
    for name, pattern in patterns.items():
        if longest <= pattern.sink_size + pattern.recent_size:
            raise UserError(
                f"the longest context has {longest} tokens, which all fit in the window of {name} "
                f"(sink_size={pattern.sink_size}, recent_size={pattern.recent_size}): raise lengths"
            )


def check_shares(patterns: Mapping[str, HeadPattern], caches: Sequence[float], lengths: Sequence[int]) -> None:
    """Raise a `UserError` if a share of the cache cannot be kept at a length; warn where equal scores part heads."""
    for (name, pattern), cache, length in product(patterns.items(), caches, lengths):
        for heads in [pattern] if pattern.needs is None else [pattern, replace(pattern, needs=None)]:
            try:
                heads.allocate(cache, length)
            except UserError as error:
                raise UserError(f"heads of {name}: {error}; or raise lengths") from None


def warn_of_short_contexts(
    patterns: Mapping[str, HeadPattern], caches: Sequence[float], contexts: Sequence[int]
) -> None:
    """Warn where contexts, of so many tokens, are too short for a share of the cache and keep the smallest window."""
    for cache in caches:
        masks = [replace(pattern, needs=None) for pattern in patterns.values()]
        least = {tokens: max(least_share(mask, tokens) for mask in masks) for tokens in set(contexts)}
        short = [tokens for tokens in contexts if least[tokens] > cache * (1 + 1e-9)]  # that one is rounded up
        if short:
            warnings.warn(
                f"cache={cache:g}: {len(short)} of {len(contexts)} contexts are too short for it and keep up to "
                f"{least[min(short)]:.3g}, since sink and window take that much of {min(short)} tokens",
                stacklevel=2,
            )


def warn_of_other_weights(patterns: Mapping[str, HeadPattern], weights: str | None) -> None:
    """Warn of heads that were found on weights of other bits than they are scored on; see `LanguageModel.weights`."""
    for name, pattern in patterns.items():
        if line := describe_weights(pattern.provenance, weights, f"heads of {name}"):
            warnings.warn(line, stacklevel=2)


def _spans_of_share(pattern: HeadPattern, cache: float, tokens: int) -> HeadSpans:
    """The pattern's spans at a context of `tokens` tokens; at least its smallest."""
    with warnings.catch_warnings(action="ignore", category=TieWarning):  # `check_shares` has warned
        return pattern.allocate(max(cache, least_share(pattern, tokens)), tokens)


def _mask_of_share(pattern: HeadPattern, cache: float, tokens: int) -> HeadMask:
    """The pattern's mask with as many retrieval heads as fit in a share of the cache; at least its window."""
    retrieval = _spans_of_share(replace(pattern, needs=None), cache, tokens).retrieval
    return HeadMask(retrieval, pattern.sink_size, pattern.recent_size, pattern.gated_layers)


def _window_of_share(pattern: HeadPattern, cache: float, sink: int, tokens: int) -> HeadMask:
    """All heads stream, over a window that takes a share of the cache; at least the pattern's smallest."""
    kept = tokens_within(max(cache, least_share(pattern, tokens)), tokens)
    streaming = pattern.binarize(sparsity=1)
    return HeadMask(streaming.retrieval, sink, max(1, kept - sink), pattern.gated_layers)


def _constant_mask(mask: HeadMask) -> Callable[[int], HeadMask]:
    return lambda tokens: mask


def _mask_of_equal_bytes(pattern: HeadPattern, sparsity: float, sink: int, tokens: int) -> HeadMask:
    """All heads stream, over a window of the same bytes as the pattern's mask at a context of `tokens` tokens."""
    streaming = pattern.binarize(sparsity=1)
    actual_sparsity = pattern.binarize(sparsity=sparsity).sparsity
    kept = kept_tokens(actual_sparsity, tokens, pattern.sink_size + pattern.recent_size)
    return HeadMask(streaming.retrieval, sink, max(1, kept - sink), pattern.gated_layers)
