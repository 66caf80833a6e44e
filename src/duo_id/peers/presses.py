"""The peers: presses of kvpress, each built for the number of tokens that a head may keep of a context."""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from fractions import Fraction
from pydoc_data.topics import topics
from typing import Any
from unittest.mock import patch

import pandas as pd
from kvpress import (
    AdaKVPress,
    DuoAttentionPress,
    ExpectedAttentionPress,
    KnormPress,
    KVzipPress,
    ObservedAttentionPress,
    SnapKVPress,
    StreamingLLMPress,
    TOVAPress,
)
from kvpress.presses import duo_attention_press
from kvpress.presses.base_press import BasePress
from transformers import PreTrainedModel, PreTrainedTokenizerBase

SHARED_NOTE = "prefill attends in full, entries are evicted before the question is seen"
MASKS = "masks entries without freeing them: memory stays that of the full cache, bytes count unmasked entries only"
SCORED_TEXTS, SCORED_CHARACTERS = 50, 8000  # texts that duo-on-the-fly is scored on, and characters of each


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


class PlainKVzipPress(KVzipPress):
    """KVzip for a context without a chat template, though the tokenizer has one."""

    def prepare(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *args: Any, **options: Any
    ) -> list[tuple[Any, Any]]:
        """The context split for its reconstruction: none of it belongs to a template, all is scored."""
        self.prefix_length = 0
        self._suffix_ids = tokenizer.encode("\n", return_tensors="pt", add_special_tokens=False)
        return super().prepare(model, tokenizer, *args, **options)


class SameWindowsDuoPress(DuoAttentionPress):
    """Head scores of kvpress over the windows of the evaluated mask, so that only the heads differ."""

    windows: tuple[int, int]  # sink size, recent size

    def post_init_from_model(self, model: PreTrainedModel) -> None:
        """Score the heads."""
        with _help_texts():
            super().post_init_from_model(model)
        self.sink_size, self.recent_size = self.windows


def head_scores(model: PreTrainedModel) -> list[list[float]]:
    """The scores behind `duo-on-the-fly`: one row per layer, one column per KV head; the lowest stream first."""
    with _help_texts():
        return duo_attention_press.duo_attention_on_the_fly(model).tolist()


def _help_texts() -> AbstractContextManager[Any]:
    """A context in which kvpress scores heads on Python's help texts, which need no network."""
    return patch.object(duo_attention_press, "load_dataset", lambda *name, **options: _Texts())


class _Texts:
    """Stands in for a data set with a column of chapters."""

    def to_pandas(self) -> pd.DataFrame:
        return pd.DataFrame({"chapter": [topics[name][:SCORED_CHARACTERS] for name in sorted(topics)[:SCORED_TEXTS]]})


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
        return _without_ratios(asdict(self.make(Budget(1, 0.0, 1, 1))))


def _kvzip(budget: Budget) -> BasePress:
    return (KVzipPress if budget.chat_template else PlainKVzipPress)(budget.ratio)


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
    # KVzip (arXiv 2505.23416): what is attended to while the context is repeated; reads the context twice to score it
    "kvzip": Peer(_kvzip, f"scored by repeating the context; one budget for all layers; {MASKS}"),
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
}


def _without_ratios(settings: dict[str, Any]) -> dict[str, Any]:
    return {
        key: _without_ratios(value) if isinstance(value, dict) else value
        for key, value in settings.items()
        if "compression_ratio" not in key and value is not None
    }
