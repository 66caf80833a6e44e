"""Every family of transformers does what the table in docs/models.md says."""

import os
import re
import warnings

import pytest

from tests.support.families import END, FAMILIES, START, TABLE, row, try_family

NAMED = (
    "llama mistral mixtral qwen2 qwen2_moe qwen3 qwen3_moe gemma gemma2 gemma3_text phi3 olmo2 granite cohere stablelm "
    "starcoder2 gpt_neox opt smollm3 gpt_oss qwen3_next bert deepseek_v3 falcon mamba"
).split()
LINES = TABLE.read_text().partition(START)[2].partition(END)[0].splitlines()[3:]


def test_the_table_has_every_family() -> None:
    listed = [re.split(r" ?\| ?", line)[1] for line in LINES]
    assert [family for family in listed if family in FAMILIES] == FAMILIES
    assert listed == FAMILIES or "DUO_ID_RELEASES" in os.environ, "only other releases know fewer families"
    assert set(NAMED) <= set(FAMILIES)
    assert not [line for line in LINES if "WRONG" in line]


@pytest.mark.parametrize(
    "family", [name if name in NAMED else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES]
)
def test_a_family_does_what_the_table_says(family: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert row(family, try_family(family)) in LINES
