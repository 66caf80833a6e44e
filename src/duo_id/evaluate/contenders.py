"""What an evaluation compares: the full cache, masks of head patterns, and baselines at the same bytes."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from duo_id.common.errors import UserError
from duo_id.evaluate.items import Item
from duo_id.patterns.mask import HeadMask
from duo_id.patterns.pattern import HeadPattern
from duo_id.patterns.random_masks import random_like

Key = tuple[str, str, float, int | None]


@dataclass(frozen=True)
class Contender:
    """One way of keeping the KV cache.

    Attributes:
        kind: full | pattern | baseline | eviction.
        heads: its name.
        sparsity: fraction of the gated KV heads that stream; for a baseline, the sparsity whose bytes it matches.
        seed: of a random mask.
        note: a remark for readers of the results.
        mask: returns its mask for a context length in tokens; None where duo_id does not run it.
    """

    kind: str
    heads: str
    sparsity: float
    seed: int | None = None
    note: str = ""
    mask: Callable[[int], HeadMask] | None = None

    @property
    def key(self) -> Key:
        """Its identity: no two contenders share one."""
        return self.kind, self.heads, self.sparsity, self.seed

    def describe(self) -> dict[str, Any]:
        """Everything but the mask, as plain values."""
        return {name: getattr(self, name) for name in ("kind", "heads", "sparsity", "seed", "note")}


def contenders(
    patterns: Mapping[str, HeadPattern],
    sparsities: Sequence[float],
    random_masks: int,
    baselines: Sequence[str],
    seed: int,
) -> list[Contender]:
    """Everything that is compared, full attention first.

    Args:
        patterns: by name; baselines take their windows and budgets from the first.
        sparsities: of their masks.
        random_masks: number at each sparsity.
        baselines: `streaming`: every head keeps the sink and as many recent tokens as the bytes of a mask allow
            (StreamingLLM, Xiao et al. 2023, arXiv 2309.17453); `window`: recent tokens only. Both match the bytes of
            each sparsity, and at sparsity 1 use the pattern's own window.
        seed: of the first random mask.
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
        for sparsity in sorted({*sparsities, 1.0}):
            note = f"sink {sink}, plus as many recent tokens as the bytes allow"
            mask_for_length = partial(_mask_of_equal_bytes, first, sparsity, sink)
            lineup.append(Contender("baseline", name, sparsity, note=note, mask=mask_for_length))
    return lineup


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


def _constant_mask(mask: HeadMask) -> Callable[[int], HeadMask]:
    return lambda tokens: mask


def _mask_of_equal_bytes(pattern: HeadPattern, sparsity: float, sink: int, tokens: int) -> HeadMask:
    """All heads stream, over a window of the same bytes as the pattern's mask at a context of `tokens` tokens."""
    streaming = pattern.binarize(sparsity=1)
    actual_sparsity = pattern.binarize(sparsity=sparsity).sparsity
    kept = kept_tokens(actual_sparsity, tokens, pattern.sink_size + pattern.recent_size)
    return HeadMask(streaming.retrieval, sink, max(1, kept - sink), pattern.gated_layers)
