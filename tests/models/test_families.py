"""Every family of transformers does what the table in docs/models.md says, and its head runs without its layers."""

import os
import re
import warnings

import pytest
import torch

from duo_id.models.language_model import LanguageModel
from duo_id.models.loading import byte_tokenizer
from tests.support.families import (
    END,
    FAMILIES,
    START,
    TABLE,
    assert_close,
    random_tokens,
    row,
    runnable_model,
    try_family,
)

NAMED = (
    "llama mistral mixtral qwen2 qwen2_moe qwen3 qwen3_moe gemma gemma2 gemma3_text phi3 olmo2 granite cohere stablelm "
    "starcoder2 gpt_neox opt smollm3 gpt_oss granitemoehybrid bert deepseek_v3 falcon mamba"
).split()
OTHERS_SLOW = [name if name in NAMED else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES]
LINES = TABLE.read_text().partition(START)[2].partition(END)[0].splitlines()[3:]


def test_the_table_has_every_family() -> None:
    listed = [re.split(r" ?\| ?", line)[1] for line in LINES]
    assert [family for family in listed if family in FAMILIES] == FAMILIES
    assert listed == FAMILIES or "DUO_ID_RELEASES" in os.environ, "only other releases know fewer families"
    assert set(NAMED) <= set(FAMILIES)
    assert not [line for line in LINES if "WRONG" in line]


@pytest.mark.parametrize("family", OTHERS_SLOW)
def test_a_family_does_what_the_table_says(family: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert row(family, try_family(family)) in LINES


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", OTHERS_SLOW)
def test_logits_of_hidden_states_are_the_models_own(family: str) -> None:
    """Of gated and refused families alike, whatever they do to their last states and their logits."""
    ids, model = random_tokens(2, 16), runnable_model(family)
    language_model = LanguageModel(model, byte_tokenizer(), "tiny", "tiny", None, "random")
    with torch.no_grad():
        logits = language_model.logits(language_model.hidden_states({"input_ids": ids, "attention_mask": None}))
        assert_close(logits, model(ids, use_cache=False).logits, "logits of the head alone")
