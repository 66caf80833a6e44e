"""Routing a model's attention: padding, sliding layers, what is refused, and that nothing is left behind."""

import gc
import weakref

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from duo_id.attention.interface import attached, bound
from duo_id.attention.layers import BOUND
from duo_id.common.errors import UserError
from tests.attention.conftest import TOKENS
from tests.attention.test_functions import MakeModel, gates
from tests.support.tiny import FAMILIES


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing_for_real_tokens(family: str, side: str, make_model: MakeModel, ids: Tensor) -> None:
    model = make_model(family)
    gap = 13
    mask = torch.ones(2, TOKENS, dtype=torch.long)
    real = slice(gap, None) if side == "left" else slice(None, -gap)
    mask[1, : gap if side == "left" else None] = 0
    if side == "right":
        mask[1] = 1
        mask[1, -gap:] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with attached(model) as layers:
        alpha = torch.linspace(0, 1, 3 * layers[0].kv_heads).view(3, -1)
        with bound(layers, gates(layers, alpha)):
            batch = model(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
            alone = [model(row[None], use_cache=False).logits[0] for row in (ids[0], ids[1, real])]
    torch.testing.assert_close(batch[0], alone[0], atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(batch[1, real], alone[1], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_tokens_hidden_in_the_middle_are_as_if_they_were_not_there(
    family: str, make_model: MakeModel, ids: Tensor
) -> None:
    """They do not count in a window either, the model's own or that of streaming heads."""
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    sliding = {"head_dim": 16, "sliding_window": 9, "layer_types": kinds}
    model = make_model(family, **(sliding if family == "gemma3_text" else {}))
    mask = torch.ones_like(ids)
    mask[0, [0, 5, 6, 30]] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    real = mask[0].bool()
    with attached(model) as layers, bound(layers, gates(layers, torch.full((len(layers), layers[0].kv_heads), 0.3))):
        found = model(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
        for row, alone in ((found[0, real], ids[:1, real]), (found[1], ids[1:])):
            expected = model(alone, use_cache=False).logits[0]
            torch.testing.assert_close(row, expected, atol=2e-5, rtol=1e-4)


def test_a_cache_is_refused(make_model: MakeModel, ids: Tensor) -> None:
    model = make_model("llama")
    with attached(model), pytest.raises(UserError, match="use_cache=False"):
        model(ids[:, :1], past_key_values=model_cache(model, ids))


def model_cache(model: PreTrainedModel, ids: Tensor) -> object:
    return model(ids, use_cache=True).past_key_values


def test_sliding_layers_keep_their_window_and_get_no_gate(make_model: MakeModel, ids: Tensor) -> None:
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    model = make_model("gemma3_text", head_dim=16, sliding_window=9, layer_types=kinds)
    expected = model(ids, use_cache=False).logits
    with attached(model) as layers:
        assert [layer.index for layer in layers] == [1]
        torch.testing.assert_close(model(ids, use_cache=False).logits, expected, atol=2e-5, rtol=1e-4)
        padded = torch.ones_like(ids)
        padded[1, :20] = 0
        positions = (padded.cumsum(-1) - 1).clamp(min=0)
        batch = model(ids, attention_mask=padded, position_ids=positions, use_cache=False).logits
        alone = model(ids[1:, 20:], use_cache=False).logits
        torch.testing.assert_close(batch[1, 20:], alone[0], atol=2e-5, rtol=1e-4)


def test_the_model_is_as_before_also_after_an_error(make_model: MakeModel, ids: Tensor) -> None:
    model = make_model("llama")
    before, expected = model.config._attn_implementation, model(ids, use_cache=False).logits
    modules = []

    def fails():
        with attached(model) as layers:
            modules.extend(layer.module for layer in layers)
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fails()
    assert model.config._attn_implementation == before
    assert not any(hasattr(module, BOUND) for module in modules)
    assert torch.equal(model(ids, use_cache=False).logits, expected)


@pytest.mark.parametrize(
    ("family", "changes", "reason"),
    [
        ("mamba", {}, "no attention that can be gated"),
        ("bert", {}, "looks ahead"),
        ("phimoe", {"sliding_window": 16, "num_local_experts": 2}, "sliding window of 16 .*do not report"),
        ("falcon", {}, "no attention that can be gated"),
        ("deepseek_v3", {"num_key_value_heads": 4}, "latent attention"),
        ("mistral", {"sliding_window": 16}, r"sliding window of 16 .*model.config.sliding_window=null"),
    ],
)
def test_models_that_cannot_be_gated_are_refused(
    family: str, changes: dict, reason: str, make_model: MakeModel
) -> None:
    model = make_model(family, **changes)
    before = model.config._attn_implementation
    with pytest.raises(UserError, match=reason), attached(model):
        pass
    assert model.config._attn_implementation == before


def test_a_layer_that_does_not_reach_us_is_an_error(make_model: MakeModel) -> None:
    model = make_model("llama")
    stray = model.model.layers[1].self_attn
    stray.forward = lambda hidden_states, **unused: (hidden_states, None)
    with pytest.raises(UserError, match=r"layers \[1\] does not reach"), attached(model):
        pass


def test_a_model_that_was_attached_is_freed(make_model: MakeModel, ids: Tensor) -> None:
    model = make_model("llama")
    with attached(model):
        model(ids, use_cache=False)
    reference = weakref.ref(model)
    del model
    gc.collect()
    assert reference() is None
