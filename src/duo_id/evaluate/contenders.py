"""What an evaluation compares: the full cache, masks of head patterns, and baselines at the same bytes."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from duo_id.common.errors import UserError
from duo_id.evaluate.items import Item
from duo_id.patterns.pattern import HeadMask, HeadPattern, random_like

Key = tuple[str, str, float, int | None]


@dataclass(frozen=True)
class Contender:
    """One way to hold the KV cache.

    Attributes:
        kind: full | pattern | baseline | eviction.
        heads: its name.
        sparsity: fraction of the gated KV heads that stream; of a baseline, the sparsity whose bytes it has.
        seed: of a random mask.
        note: what a reader should know of it.
        mask: makes its mask for a context of so many tokens; None where duo_id does not run it.
    """

    kind: str
    heads: str
    sparsity: float
    seed: int | None = None
    note: str = ""
    mask: Callable[[int], HeadMask] | None = None

    @property
    def key(self) -> Key:
        """What tells it from all others."""
        return self.kind, self.heads, self.sparsity, self.seed

    def describe(self) -> dict[str, Any]:
        """Plain values."""
        return {name: getattr(self, name) for name in ("kind", "heads", "sparsity", "seed", "note")}


def contenders(
    patterns: Mapping[str, HeadPattern],
    sparsities: Sequence[float],
    random_masks: int,
    baselines: Sequence[str],
    seed: int,
) -> list[Contender]:
    """All that is compared, full attention first.

    Args:
        patterns: by name; the first gives windows and budgets to the baselines.
        sparsities: of their masks.
        random_masks: how many at each sparsity.
        baselines: `streaming`: all heads keep the same sink and as many of the latest tokens as the bytes of a mask
            allow (StreamingLLM, Xiao et al. 2023, arXiv 2309.17453); `window`: the latest tokens alone. Both at the
            bytes of each sparsity, and at sparsity 1 over the pattern's own window.
        seed: of the first random mask.
    """
    first = next(iter(patterns.values()))
    found = [Contender("full", "full", 0.0, mask=_always(first.binarize(sparsity=0)))]
    for name, pattern in patterns.items():
        window = f"sink {pattern.sink_size}, recent {pattern.recent_size}"
        for sparsity in sparsities:
            mask = pattern.binarize(sparsity=sparsity)
            found.append(Contender("pattern", name, sparsity, note=window, mask=_always(mask)))
    for sparsity in sparsities:
        for drawn in range(seed, seed + random_masks):
            found.append(
                Contender("baseline", "random", sparsity, drawn, mask=_always(random_like(first, sparsity, drawn)))
            )
    for name in baselines:
        sink = first.sink_size if name == "streaming" else 0
        for sparsity in sorted({*sparsities, 1.0}):
            note = f"sink {sink}, and as many of the latest tokens as the bytes allow"
            same = partial(_same_bytes, first, sparsity, sink)
            found.append(Contender("baseline", name, sparsity, note=note, mask=same))
    return found


def kept_tokens(sparsity: float, tokens: int, window: int) -> int:
    """Tokens that each head may keep: on average what a mask of `sparsity` keeps of `tokens`, at least a window."""
    return round((1 - sparsity) * max(tokens, window) + sparsity * window)


def check_windows(patterns: Mapping[str, HeadPattern], items: Sequence[Item]) -> None:
    """Raise a `UserError` if no context is longer than a window, for then every mask is full attention."""
    longest = max(len(item.context) for item in items)
    for name, pattern in patterns.items():
        if longest <= pattern.sink_size + pattern.recent_size:
            raise UserError(
                f"the longest context has {longest} tokens, of which {name} with sink_size={pattern.sink_size} and "
                f"recent_size={pattern.recent_size} leaves none outside the window: raise lengths"
            )


def _always(mask: HeadMask) -> Callable[[int], HeadMask]:
    return lambda tokens: mask


def _same_bytes(pattern: HeadPattern, sparsity: float, sink: int, tokens: int) -> HeadMask:
    """All heads stream, over a window with the bytes that the pattern's mask keeps of `tokens` tokens."""
    streaming = pattern.binarize(sparsity=1)
    share = pattern.binarize(sparsity=sparsity).sparsity
    kept = kept_tokens(share, tokens, pattern.sink_size + pattern.recent_size)
    return HeadMask(streaming.retrieval, sink, max(1, kept - sink), pattern.gated_layers)
