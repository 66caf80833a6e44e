"""The peers: presses of kvpress, each built for the number of tokens that a head may keep of a context."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from inspect import signature
from typing import Any

from kvpress import (
    AdaKVPress,
    CapPress,
    ChunkKVPress,
    CompactorPress,
    CURPress,
    ExpectedAttentionPress,
    KeyDiffPress,
    KnormPress,
    KVComposePress,
    KVgradPress,
    KVzipPress,
    LagKVPress,
    LeverageScorePress,
    NonCausalAttnPress,
    ObservedAttentionPress,
    PyramidKVPress,
    SnapKVPress,
    StreamingLLMPress,
    TOVAPress,
)
from kvpress.presses.base_press import BasePress

from duo_id.peers.variants import (
    SCORED_TEXTS,
    AnyModelCriticalAdaPress,
    AnyModelCriticalPress,
    PlainKVgradPress,
    PlainKVzipPress,
    SameWindowsDuoPress,
)

SHARED_NOTE = "prefill attends in full, entries are evicted before the question is seen"
MASKS = "masks entries without freeing them: memory stays that of the full cache, bytes count unmasked entries only"
CHUNK = 20  # tokens that ChunkKV keeps or evicts together


@dataclass(frozen=True)
class Budget:
    """What may be kept of one context: as many tokens per head, on average, as a head mask keeps.

    Attributes:
        tokens: of the context.
        share: fraction of the KV heads that stream under the mask.
        sink_size: first tokens that its streaming heads keep.
        recent_size: latest tokens that they keep.
        chat_template: whether the context is in the model's chat template.
    """

    tokens: int
    share: float
    sink_size: int
    recent_size: int
    chat_template: bool = False

    @classmethod
    def of_cache(cls, tokens: int, cache: float, sink_size: int, recent_size: int, chat_template: bool) -> "Budget":
        """The budget of a share of the full cache, but for the window, which always fits."""
        window = min(tokens, sink_size + recent_size)
        kept = max(window, math.floor(Fraction(str(cache)) * tokens))
        share = (tokens - kept) / max(tokens - window, 1)
        return cls(tokens, share, sink_size, recent_size, chat_template)

    @property
    def kept(self) -> int:
        """Tokens that each head may keep, rounded."""
        window = min(self.tokens, self.sink_size + self.recent_size)
        return round((1 - self.share) * self.tokens + self.share * window)

    @property
    def ratio(self) -> float:
        """The compression ratio that leaves exactly `kept` tokens.

        kvpress rounds down what it keeps, so the ratio is a hair below the fraction evicted.
        """
        return max(0.0, 1 - self.kept / self.tokens - 1e-9)


@dataclass(frozen=True)
class Peer:
    """One press.

    Attributes:
        make: builds the press for a budget.
        note: a remark for readers of its results.
        eager: whether it needs attention weights, which only eager attention returns.
    """

    make: Callable[[Budget], BasePress]
    note: str
    eager: bool = False

    def settings(self) -> dict[str, Any]:
        """The settings of the press except its budget, as plain values."""
        return _settings(self.make(Budget(1, 0.0, 1, 1)))


def _kvzip(budget: Budget, **options: bool) -> BasePress:
    return (KVzipPress if budget.chat_template else PlainKVzipPress)(budget.ratio, **options)


def _kvgrad(budget: Budget) -> BasePress:
    return (KVgradPress if budget.chat_template else PlainKVgradPress)(budget.ratio)


def _bare_expected(budget: Budget) -> BasePress:
    """CriticalKV has a norm of its own in place of the values'."""
    return ExpectedAttentionPress(budget.ratio, use_vnorm=False)


def _chunkkv(budget: Budget) -> BasePress:
    """As many chunks as the budget holds; the last one, short as it may be, is in SnapKV's window and stays."""
    chunks, rest = math.ceil(budget.tokens / CHUNK), budget.tokens % CHUNK
    whole = (budget.kept - rest) // CHUNK
    ratio = max(0.0, 1 - (whole + (rest > 0)) / chunks - 1e-9)
    return ChunkKVPress(SnapKVPress(ratio), CHUNK)


def _duo(budget: Budget) -> BasePress:
    press = SameWindowsDuoPress(budget.share, on_the_fly_scoring=True)
    press.windows = budget.sink_size, budget.recent_size
    return press


PEERS = {
    # SnapKV (arXiv 2404.14469): what the last 64 tokens attend to, each head for itself
    "snapkv": Peer(lambda budget: SnapKVPress(budget.ratio), "window 64, kernel 5"),
    # TOVA (arXiv 2401.06104): what the last token attends to, the same tokens for all heads of a layer
    "tova": Peer(lambda budget: TOVAPress(budget.ratio), "the same tokens for all heads of a layer"),
    # H2O (arXiv 2306.14048): what all tokens attend to; needs tokens x tokens weights, so contexts must be short
    "observed": Peer(
        lambda budget: ObservedAttentionPress(budget.ratio), "H2O's score, in eager attention", eager=True
    ),
    # Expected attention (arXiv 2510.00636): what future queries are expected to attend to, from their statistics
    "expected": Peer(lambda budget: ExpectedAttentionPress(budget.ratio), "512 future positions"),
    # AdaKV (arXiv 2407.11550): spreads a layer's budget by the heads' needs
    "ada-snapkv": Peer(lambda budget: AdaKVPress(SnapKVPress(budget.ratio)), f"safeguard 0.2; {MASKS}"),
    "ada-expected": Peer(lambda budget: AdaKVPress(ExpectedAttentionPress(budget.ratio)), f"safeguard 0.2; {MASKS}"),
    # DuoAttention's split of heads by kvpress's training-free scores: static heads, not eviction
    "duo-on-the-fly": Peer(
        _duo,
        f"static heads by kvpress's scores of mean queries and keys, on {SCORED_TEXTS} help texts of Python instead of "
        f"BookSum, over the evaluated mask's windows instead of 128 and 256; {MASKS}",
    ),
    # StreamingLLM (arXiv 2309.17453): the first 4 and the latest tokens
    "streaming-llm": Peer(lambda budget: StreamingLLMPress(budget.ratio), "sink 4; keys keep their positions"),
    # Key norm (arXiv 2406.11430): keeps keys of small norm
    "knorm": Peer(lambda budget: KnormPress(budget.ratio), "keys of small norm stay"),
    # KVzip (arXiv 2505.23416): what is attended to while the context is repeated; reads the context twice to score it
    "kvzip": Peer(_kvzip, f"scored by repeating the context; one budget for all layers; {MASKS}"),
    # PyramidKV (arXiv 2406.02069): SnapKV's scores, most for the first layers
    "pyramidkv": Peer(
        lambda budget: PyramidKVPress(budget.ratio),
        "window 64, kernel 5; falls back to the same budget for all layers where the last would keep fewer than 64",
    ),
    # ChunkKV (arXiv 2502.00299): SnapKV's scores, summed over 20 tokens, the same ones for all heads of a layer
    "chunkkv": Peer(_chunkkv, "SnapKV's scores; whole chunks of 20 tokens, as many as the budget holds"),
    # CriticalAdaKV on expected attention, of the paper below
    "critical-ada-expected": Peer(
        lambda budget: AnyModelCriticalAdaPress(_bare_expected(budget)),
        f"on expected attention without the values' norm; safeguard 0.2; {MASKS}",
    ),
    # KeyDiff (arXiv 2504.15364): keys that differ from the mean key
    "keydiff": Peer(lambda budget: KeyDiffPress(budget.ratio), "the whole context at once, the paper block by block"),
    # LagKV (arXiv 2504.04704): keys and values that vary within the range of the 128 tokens after theirs
    "lagkv": Peer(
        lambda budget: LagKVPress(budget.ratio),
        "sink 4; the last 128 to 255 tokens score highest, and where they exceed the budget it is arbitrary which of "
        "them stay; contexts below 260 tokens keep the sink and the latest",
    ),
    # CurDKV (arXiv 2509.15038): keys and values of large norm
    "cur": Peer(
        lambda budget: CURPress(budget.ratio),
        "sink 4; squared norms in place of leverage scores, relative to 16 neighbours, or the fewer at the end, which "
        "thereby score higher",
    ),
    # Compactor (arXiv 2507.08143) and its two parts: keys that the others do not span, and attention without a mask
    "leverage": Peer(
        lambda budget: LeverageScorePress(budget.ratio), "sketch of 48 dimensions, drawn from the run's seed"
    ),
    "noncausal": Peer(
        lambda budget: NonCausalAttnPress(budget.ratio),
        "chunks of 256, the last one padded by keys that draw attention",
    ),
    "compactor": Peer(
        lambda budget: CompactorPress(budget.ratio),
        "leverage, weighted by the fraction evicted, and noncausal; the first 8 and last 4 tokens stay",
    ),
    # CapKV (arXiv 2604.25975): values that the others do not span, weighted by what queries to come would attend to
    "cap": Peer(
        lambda budget: CapPress(budget.ratio),
        "sink 4; normalised keys and queries, the queries at 512 future positions, in which it differs from the paper",
    ),
    # CriticalKV (arXiv 2502.03805): half the budget by a score, the rest by it times what values add to the output
    "critical-snapkv": Peer(lambda budget: AnyModelCriticalPress(SnapKVPress(budget.ratio)), "on SnapKV, window 64"),
    "critical-expected": Peer(
        lambda budget: AnyModelCriticalPress(_bare_expected(budget)), "on expected attention without the values' norm"
    ),
    "critical-ada-snapkv": Peer(
        lambda budget: AnyModelCriticalAdaPress(SnapKVPress(budget.ratio)), f"on SnapKV; safeguard 0.2; {MASKS}"
    ),
    # KVCompose (arXiv 2509.05165): what the context read again attends to; each head its own tokens, layers as needed
    "kvcompose": Peer(
        lambda budget: KVComposePress(compression_ratio=budget.ratio),
        "scored by reading the context twice, in eager attention; one budget for all layers, the first keeps most",
    ),
    # KVzip+ (arXiv 2601.07891): KVzip's attention times what values add to the output
    "kvzip-plus": Peer(
        lambda budget: _kvzip(budget, kvzip_plus_normalization=True),
        f"scored by repeating the context; one budget for all layers; {MASKS}",
    ),
    # KVgrad (openreview.net/forum?id=cg1wTCJjjk): that, times the gradient of the last hidden states
    "kvgrad": Peer(
        _kvgrad, f"scored by repeating 512 tokens at a time, forward and backward; one budget for all layers; {MASKS}"
    ),
}


def _settings(press: BasePress) -> dict[str, Any]:
    """What a press, and the one that it wraps, are made with, except for budgets and what is None."""
    settings = {
        name: getattr(press, name)
        for name in signature(type(press)).parameters
        if "compression_ratio" not in name and not name.startswith("_")
    }
    return {
        name: _settings(value) if isinstance(value, BasePress) else value
        for name, value in settings.items()
        if value is not None
    }
