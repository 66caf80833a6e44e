"""Tiny tokenizers of the kinds that language models have, and haystacks to read from."""

from collections.abc import Callable

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from duo_id.data.haystack import Haystack
from duo_id.data.settings import DataSettings
from duo_id.models.loading import byte_tokenizer

CORPUS = [f"The {animal} of number {n} sleeps near the old mill." for animal in ("fox", "owl") for n in range(99)]
QUICK = {
    "length_min": 700,
    "length_max": 900,
    "num_lengths": 3,
    "num_passkeys": 3,
    "passkey_words": 2,
    "num_questions": 3,
    "num_turns": 3,
    "answer_words": 2,
    "answer_tokens": 10,
}


def bytes_only() -> PreTrainedTokenizerBase:
    """One token a byte, nothing in front."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: number for number, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def byte_level_bpe() -> PreTrainedTokenizerBase:
    """As GPT-2 and Llama 3: merges within words, here with <s> in front and </s> behind."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, special_tokens=["<s>", "</s>"])
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def metaspace() -> PreTrainedTokenizerBase:
    """As SentencePiece: a ▁ before every piece of text, and bytes for what is unknown."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace()
    special = ["<unk>", "<s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokenizer.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=600, special_tokens=special))
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", unk_token="<unk>")


TOKENIZERS = {maker.__name__: maker() for maker in (bytes_only, byte_tokenizer, byte_level_bpe, metaspace)}


def find(piece, tokens):
    """The places where the list `piece` stands in the list `tokens`."""
    return [place for place in range(len(tokens)) if tokens[place : place + len(piece)] == piece]


@pytest.fixture(params=TOKENIZERS)
def any_tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerBase:
    return TOKENIZERS[request.param]


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerBase:
    return TOKENIZERS["bytes_only"]


@pytest.fixture
def bos_tokenizer() -> PreTrainedTokenizerBase:
    return TOKENIZERS["byte_level_bpe"]


@pytest.fixture
def quick() -> Callable[..., DataSettings]:
    """Settings of short samples, with changes."""
    return lambda **changes: DataSettings(**(QUICK | changes))


@pytest.fixture
def make_haystack() -> Callable[..., Haystack]:
    """A haystack of a list of documents."""

    def make(documents: list[str], split: str = "train") -> Haystack:
        return Haystack(documents, np.array([len(document.encode()) for document in documents]), split)

    return make


@pytest.fixture(autouse=True)
def dataset_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep what `datasets` converts out of the user's cache."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
