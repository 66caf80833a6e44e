"""Tiny random models of several families, shared by all tests."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from duo_id.attention.interface import attached
from duo_id.methods.settings import GateSettings
from duo_id.models.gated_model import GatedModel
from duo_id.models.language_model import LanguageModel
from duo_id.models.loading import byte_tokenizer
from duo_id.step.prepare import prepared_step
from duo_id.step.settings import StepSettings
from duo_id.train.gate_training import GateTraining

# Sizes that differ where a mix-up would show: head_dim != hidden_size / heads wherever the family allows it.
SHARED = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"head_dim": 16, "tie_word_embeddings": True},
    "mistral": {"sliding_window": None},
    "qwen2": {},
    "qwen3": {"head_dim": 16},
    "gemma": {"head_dim": 16},
    "phi3": {},
    "stablelm": {},
    "gpt_neox": {},
}


def tiny_model(family: str, **changes: Any) -> PreTrainedModel:
    """A frozen random model with larger weights than usual, so that attention is far from uniform."""
    config = AutoConfig.for_model(family, **{**SHARED, **FAMILIES.get(family, {}), **changes})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(
            config, dtype=torch.float32, attn_implementation=exact_attention(config)
        )
        draw_weights(model)
    return model.eval().requires_grad_(False)


def exact_attention(config: PreTrainedConfig) -> str | None:
    """An attention implementation that applies soft caps; early releases default to SDPA, which ignores them."""
    return "eager" if getattr(config, "attn_logit_softcapping", None) else None


def hooks_of(model: torch.nn.Module) -> list[int]:
    """The ids of all forward hooks on the modules of a model."""
    return [hook for module in model.modules() for hook in (*module._forward_pre_hooks, *module._forward_hooks)]


def draw_weights(model: PreTrainedModel) -> None:
    """Draw larger weights than transformers' initialisation, and non-zero attention sinks."""
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2 and "embed" not in name:
            torch.nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5 * 1.5)
        elif "sink" in name:
            torch.nn.init.normal_(parameter)


def compute_all_logits(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a model be one of those whose forward takes no `logits_to_keep`."""
    plain = model.forward

    def forward(input_ids: Tensor, attention_mask: Tensor | None = None, use_cache: bool | None = None) -> Any:
        return plain(input_ids=input_ids, attention_mask=attention_mask, use_cache=use_cache)

    monkeypatch.setattr(model, "forward", forward)


@contextmanager
def tiny_training(
    method: GateSettings, step: StepSettings | None = None, device: str = "cpu", **changes: Any
) -> Iterator[GateTraining]:
    """The training of a tiny model, with gates attached."""
    step = step or StepSettings()
    model = tiny_model(**{"family": "llama"} | changes).to(device)
    language_model = LanguageModel(model, byte_tokenizer(), "tiny", "tiny", None, "random")
    with attached(model, step.backends) as layers:
        gated_model = GatedModel(language_model, layers, method.window, step.backends)
        training = GateTraining(gated_model, method, step, 10, [0.5]).to(device)
        with prepared_step(training.distillation, step) as training.apply_plan:
            yield training
