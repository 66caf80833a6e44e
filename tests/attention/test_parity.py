"""What a model does by itself and under our function are compared when it is attached."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from duo_id.attention import parity
from duo_id.attention.interface import attached
from duo_id.common.errors import UserError
from tests.support.tiny import tiny_model

KINDS = ["sliding_attention", "full_attention"] * 2
HYBRID: dict[str, Any] = {"head_dim": 16, "sliding_window": 9, "layer_types": KINDS, "num_hidden_layers": 4}


@contextmanager
def forwards(model: PreTrainedModel) -> Iterator[list[int]]:
    """How many tokens each forward of the block had."""
    found: list[int] = []
    hook = model.register_forward_pre_hook(
        lambda module, args, kwargs: found.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    yield found
    hook.remove()


def branch(model: PreTrainedModel, layer: int, change: Any) -> None:
    """Let an attention module do something more under the names that transformers has."""
    module = model.model.layers[layer].self_attn
    plain = module.forward

    def forward(hidden_states: Tensor, **options: Any) -> Any:
        if module.config._attn_implementation in ("eager", "sdpa"):
            hidden_states = change(hidden_states)
        return plain(hidden_states=hidden_states, **options)

    module.forward = forward


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize(("family", "changes"), [("llama", {}), ("gpt2", {}), ("gemma3_text", HYBRID)])
def test_models_pass_in_every_type(
    family: str, changes: dict[str, Any], implementation: str, dtype: torch.dtype
) -> None:
    model = tiny_model(family, **changes).to(dtype)
    model.set_attn_implementation(implementation)
    with attached(model):
        pass


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layer", [0, 2])
def test_a_model_that_branches_on_names_is_refused(layer: int, dtype: torch.dtype) -> None:
    """From some length on, as block-sparse attention does: the probe's few tokens cannot tell."""
    model = tiny_model("llama", max_position_embeddings=512).to(dtype)

    def change(states: Tensor) -> Tensor:
        return torch.cat([states[:, :100], states[:, 100:].flip(1)], 1) if states.shape[1] > 100 else states

    branch(model, layer, change)
    before = model.config._attn_implementation
    with (
        pytest.raises(UserError, match=rf"256 tokens model.layers.{layer}.self_attn differs by .* \(sdpa\)"),
        attached(model),
    ):
        pass
    assert model.config._attn_implementation == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_single_token_is_enough(dtype: torch.dtype) -> None:
    model = tiny_model("llama", max_position_embeddings=512).to(dtype)

    def change(states: Tensor) -> Tensor:
        return torch.cat([states[:, :-1], -states[:, -1:]], 1) if states.shape[1] > 100 else states

    branch(model, 1, change)
    with pytest.raises(UserError, match=r"model.layers.1.self_attn differs"), attached(model):
        pass


def test_each_layer_is_compared_from_the_same_input() -> None:
    """A difference in one layer does not become one of the layers behind it."""
    model = tiny_model("llama", max_position_embeddings=512)
    branch(model, 0, lambda states: states * 1.0001)
    with attached(model):
        pass


def test_what_lies_beside_attention_is_not_blamed_on_it() -> None:
    """All layers behind get other states, and yet each is compared from those of the model's own forward."""
    model = tiny_model("llama", max_position_embeddings=512)
    mlp = model.model.layers[0].mlp
    plain = mlp.forward
    mlp.forward = lambda states: plain(states) * (3 if model.config._attn_implementation == "sdpa" else 1)
    with attached(model):
        pass


def test_it_is_done_once_for_a_model_and_again_for_another_type() -> None:
    model = tiny_model("llama", max_position_embeddings=512)
    with forwards(model) as found:
        for _ in range(2):
            with attached(model):
                pass
        assert found == [4, 256, 256, 4]
        model.bfloat16()
        with attached(model):
            pass
        assert found[4:] == [4, 256, 256]


def test_short_models_are_compared_over_what_they_read() -> None:
    model = tiny_model("llama", max_position_embeddings=64)
    with forwards(model) as found, attached(model):
        pass
    assert found == [4, 60, 60]


def test_a_model_in_training_is_compared_as_it_evaluates_and_draws_nothing() -> None:
    model = tiny_model("gpt2", attn_pdrop=0.5, resid_pdrop=0.5)
    model.train()
    model.transformer.h[1].eval()
    modes = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    with attached(model):
        assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("option", "reason"),
    [({"block_indices": torch.zeros(1)}, "takes block_indices"), ({"is_causal": False}, "looks ahead")],
)
def test_options_that_are_not_known_are_refused(option: dict[str, Any], reason: str) -> None:
    model = tiny_model("llama")
    module: nn.Module = model.model.layers[1].self_attn
    plain = module.forward
    module.forward = lambda **options: plain(**options, **option)  # type: ignore[method-assign]
    with pytest.raises(UserError, match=rf"layers.1.self_attn cannot be gated or masked: .*{reason}"), attached(model):
        pass


def test_options_that_come_later_are_refused_too() -> None:
    model = tiny_model("llama")
    with attached(model), pytest.raises(UserError, match="cu_seq_lens_q"):
        model(torch.arange(3, 13)[None], use_cache=False, cu_seq_lens_q=torch.tensor([0, 5, 10]))


def test_layers_of_unknown_kinds_get_no_gates() -> None:
    model = tiny_model("llama", num_hidden_layers=3)
    model.config.layer_types = ["full_attention", "indexed_attention", "full_attention"]
    with attached(model) as layers:
        assert [layer.index for layer in layers] == [0, 2]
    model.config.layer_types = ["indexed_attention"] * 3
    with pytest.raises(UserError, match="its layers are indexed_attention, none of which"), attached(model):
        pass


def test_a_tolerance_for_every_type_that_is_below_what_a_wrong_pattern_does() -> None:
    assert max(parity.TOLERANCES.values()) < 0.05
