"""Samples of the generated tasks under several tokenizers, and their text."""

from functools import cache

import pytest
from omegaconf import OmegaConf
from tokenizers import decoders
from transformers import PreTrainedTokenizerBase

from duo_id.common.config import conf_dir, parse
from duo_id.data.chat import Chat, plain
from duo_id.data.haystack import Haystack, load_haystack
from duo_id.data.settings import HaystackSettings
from duo_id.evaluate.items import SPLITS, Item
from duo_id.evaluate.tasks.building import SampleBuilder
from duo_id.evaluate.tasks.names import GROUPS
from duo_id.evaluate.tasks.registry import make_items
from duo_id.models.loading import byte_tokenizer, load_tokenizer, weights_source
from duo_id.models.settings import ModelSettings
from tests.data.conftest import TOKENIZERS, metaspace

LENGTHS = {"bytes": 2600, "byte_level_bpe": 1600, "metaspace": 1600, "smollm2": 512}  # tokens
MORE = 2.5  # times as many for conversations, instructions and long answers
AFTER = "[END]\n[ASSISTANT]\n"  # of a made-up chat template


@cache
def tokenizer_of(name: str) -> PreTrainedTokenizerBase:
    if name == "bytes":
        return byte_tokenizer()
    if name == "smollm2":
        settings = parse(ModelSettings, OmegaConf.load(conf_dir() / "model" / "smollm2-135m.yaml"))
        if weights_source(settings) == settings.id:
            pytest.skip("the embedded model is not installed")
        return load_tokenizer(settings)
    if name == "metaspace":
        return whole_metaspace()
    return TOKENIZERS[name]


def whole_metaspace() -> PreTrainedTokenizerBase:
    """With a decoder that restores all bytes, like SentencePiece's."""
    tokenizer = metaspace()
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.backend_tokenizer.decoder = decoders.Sequence(steps)
    return tokenizer


def builder_of(
    name: str = "bytes", split: str = "test", chat: Chat | None = None, haystack: Haystack | None = None
) -> SampleBuilder:
    tokenizer = tokenizer_of(name)
    haystack = haystack or load_haystack(HaystackSettings(source="library"), split)
    return SampleBuilder(tokenizer, haystack, split, chat or plain(tokenizer))


@cache
def items_of(
    task: str, tokenizer: str = "bytes", split: str = "test", samples: int = 1, seed: int = 0, length: int | None = None
) -> list[Item]:
    return make_items(
        [task],
        builder_of(tokenizer, split),
        [length or length_of(task, tokenizer)],
        samples,
        seed,
        limit=None,
        depths=3,
    )


def length_of(task: str, tokenizer: str = "bytes") -> int:
    """Tokens of the task's samples."""
    return int(LENGTHS[tokenizer] * (MORE if task in GROUPS["writing"] else 1))


def some(task: str, samples: int = 3) -> list[tuple[Item, str, str]]:
    """Samples of both splits, with bytes as tokens: item, split, and the text of the context."""
    return [
        (item, split, text(item.context)) for split in SPLITS for item in items_of(task, split=split, samples=samples)
    ]


def text(tokens: tuple[int, ...], tokenizer: str = "bytes") -> str:
    return str(tokenizer_of(tokenizer).decode(list(tokens)))


# Tasks with questions after the context, each asked alone.
ASKED = [name for name in GROUPS["all"] if name not in ("language", "rare-ngrams")]
