"""Tiny gated models ready to be scored, and needles in random tokens."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from duo_id.attention.functions import Backends
from duo_id.attention.interface import attached
from duo_id.attention.window import Window
from duo_id.data.samples import UNSCORED, Sample
from duo_id.methods.settings import AttentionSettings
from duo_id.models.gated_model import GatedModel
from duo_id.models.language_model import LanguageModel

WINDOW = Window(3, 8)
MakeGatedModel = Callable[..., AbstractContextManager[GatedModel]]


def one_word_tokenizer() -> PreTrainedTokenizerFast:
    """Every word is token 12, which the vocabularies of tiny models have."""
    tokenizer = Tokenizer(WordLevel({"<unk>": 12}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


@contextmanager
def gated_model_of(model: PreTrainedModel, window: Window = WINDOW) -> Iterator[GatedModel]:
    """A model attached within the block."""
    wrapped = LanguageModel(model, one_word_tokenizer(), "tiny", "tiny", None, "random")
    with attached(model, Backends()) as layers:
        yield GatedModel(wrapped, layers, window, Backends())


def settings(reduction: str = "max") -> AttentionSettings:
    """Settings of any method that uses attention weights."""
    return AttentionSettings("attention_profile", 3, 8, samples=1, reduction=reduction)


def haystack(tokens: int, *needles: tuple[int, int, int], seed: int = 0) -> Sample:
    """Random tokens in which needles (position, answer position, length) are repeated, as answers in turn."""
    ids = torch.randint(3, 96, (tokens,), generator=torch.Generator().manual_seed(seed))
    answers = torch.zeros_like(ids)
    for turn, (position, answer_position, length) in enumerate(needles, 1):
        ids[answer_position : answer_position + length] = ids[position : position + length]
        answers[answer_position : answer_position + length] = turn
    return Sample(input_ids=ids, labels=torch.where(answers > 0, ids, UNSCORED), answers=answers)


def grouped(values: torch.Tensor, kv_heads: int, reduction: str) -> torch.Tensor:
    """Reduce query heads to KV heads, one by one."""
    group = len(values) // kv_heads
    parts = [values[group * head : group * (head + 1)] for head in range(kv_heads)]
    return torch.stack([part.max() if reduction == "max" else part.sum() / group for part in parts])


@pytest.fixture(params=["max", "mean"])
def reduction(request: pytest.FixtureRequest) -> str:
    """Both reductions over query heads."""
    return str(request.param)
