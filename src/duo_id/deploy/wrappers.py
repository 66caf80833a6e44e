"""Wrappers around models, and the methods and arguments that a head mask refuses."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from duo_id.common.errors import UserError

REFUSED = {  # methods of a model, and why
    "__reduce_ex__": "a model with bound functions cannot be pickled; leave duo_attention first, or save the weights",
    "set_attn_implementation": "it would remove the mask; leave duo_attention first",
    "generate_batch": "continuous batching uses its own cache; use generate",
    "init_continuous_batching": "continuous batching uses its own cache; use generate",
    "continuous_batching_context_manager": "continuous batching uses its own cache; use generate",
}


def unwrapped(model: Any) -> PreTrainedModel:
    """The transformers model inside a wrapper of `torch.compile` or PEFT."""
    wrapper = model
    while not isinstance(model, PreTrainedModel):
        inner = getattr(model, "_orig_mod", None)  # of torch.compile
        if inner is None and callable(getattr(model, "get_base_model", None)):
            inner = model.get_base_model()
        if not isinstance(inner, nn.Module) or inner is model:
            raise UserError(f"a {type(wrapper).__name__} is not a transformers model: pass the model itself")
        model = inner
    return model


def check_prefix(model: Any) -> None:
    """Raise a `UserError` for PEFT's prefix tuning, which passes its learned prefix in an ordinary cache."""
    config = getattr(model, "active_peft_config", None)
    if str(getattr(config, "peft_type", "")).endswith("PREFIX_TUNING"):
        raise UserError(
            "prefix tuning puts its prefix into an ordinary cache, which a head mask cannot split: use LoRA"
        )


def refusal(method: str) -> Any:
    """The replacement for a method of a model that would remove or bypass the mask."""

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise UserError(f"{method} is not possible under a head mask: {REFUSED[method]}")

    return refuse


def restarts(positions: Any) -> bool:
    """Whether the positions (batch, tokens) of a forward decrease anywhere, as in packed sequences."""
    if not isinstance(positions, Tensor) or positions.dim() != 2 or positions.shape[1] == 1:
        return False
    return not torch.compiler.is_compiling() and bool((positions.diff(dim=-1) < 0).any())
