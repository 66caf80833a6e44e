"""Presses of kvpress that differ from it in the chat template, in the models that they know or in their windows."""

from contextlib import AbstractContextManager
from pydoc_data.topics import topics
from typing import Any
from unittest.mock import patch

import pandas as pd
from kvpress import CriticalAdaKVPress, CriticalKVPress, DuoAttentionPress, KVgradPress, KVzipPress
from kvpress.presses import duo_attention_press
from transformers import PreTrainedModel, PreTrainedTokenizerBase

SCORED_TEXTS, SCORED_CHARACTERS = 50, 8000  # texts that duo-on-the-fly is scored on, and characters of each


class _Plain:
    """For a context without a chat template, though the tokenizer has one: all of it is scored."""

    def _perform_kvzip_compression(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        self.prefix_length = 0
        self._suffix_ids = tokenizer.encode("\n", return_tensors="pt", add_special_tokens=False)
        super()._perform_kvzip_compression(model, tokenizer)  # type: ignore[misc] # of KVzip


class PlainKVzipPress(_Plain, KVzipPress):
    """KVzip for such a context."""


class PlainKVgradPress(_Plain, KVgradPress):
    """KVgrad for such a context."""


class _HeadSize:
    """For models whose configuration does not tell the size of a head, which is where CriticalKV looks for it."""

    def post_init_from_model(self, model: PreTrainedModel) -> None:
        model.config.head_dim = model.model.layers[0].self_attn.head_dim
        super().post_init_from_model(model)  # type: ignore[misc] # of kvpress


class AnyModelCriticalPress(_HeadSize, CriticalKVPress):
    """CriticalKV for such models too."""


class AnyModelCriticalAdaPress(_HeadSize, CriticalAdaKVPress):
    """CriticalAdaKV for such models too."""


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
