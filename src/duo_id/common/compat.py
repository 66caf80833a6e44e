"""Names that change between releases of transformers: no other module knows which release it runs on.

transformers 5.24 renamed `past_key_values` to `cache` in models, their outputs and `generate`; the old names last until
5.40 in models and 6.0 in `generate`, and longer in the code of models' own repositories.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import transformers
from torch import nn
from transformers import DynamicCache, GenerationMixin, PreTrainedConfig, PreTrainedModel, StaticCache

CACHE_NAMES = ("cache", "past_key_values")  # of the keyword under which a forward takes the cache, newest first


def cache_argument(call: Callable[..., Any] | nn.Module) -> str:
    """The keyword under which a model, its forward or `generate` takes a cache."""
    names = inspect.signature(call.forward if isinstance(call, nn.Module) else call).parameters
    return next((name for name in CACHE_NAMES if name in names), GENERATE_CACHE)


def keeps_logits(model: nn.Module) -> bool:
    """Whether a model can compute the logits of selected positions only, by `logits_to_keep`."""
    return "logits_to_keep" in inspect.signature(model.forward).parameters


def recomputes(module: nn.Module) -> bool:
    """Whether a model keeps activations at checkpoints only, from which the backward pass recomputes the others."""
    names = ("is_activation_checkpointing", "is_gradient_checkpointing")  # 5.24 renamed the latter, which warns
    return bool(getattr(module, next((name for name in names if hasattr(type(module), name)), ""), False))


def cache_from_arguments(arguments: dict[str, Any]) -> Any:
    """The cache among the keyword arguments of a forward, under either name; None if there is none."""
    return next((arguments[name] for name in CACHE_NAMES if arguments.get(name) is not None), None)


def cache_of(output: Any) -> Any:
    """The cache in the output of a model or of `generate`; None if there is none."""
    return getattr(output, next((name for name in CACHE_NAMES if name in output), CACHE_NAMES[-1]), None)


GENERATE_CACHE = next(  # the keyword that `generate` passes on
    name for name in CACHE_NAMES if name in inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
)


def attention_configs(model: PreTrainedModel) -> list[Any]:
    """Every config of a model and of its submodels, each of which names an attention implementation."""
    configs: dict[int, Any] = {}
    pending = [part.config for part in model.modules() if isinstance(part, PreTrainedModel)]
    while pending:
        config = pending.pop()
        if id(config) not in configs:
            configs[id(config)] = config
            children = (getattr(config, name, None) for name in getattr(config, "sub_configs", {}))
            pending += [child for child in children if child is not None]
    return list(configs.values())


def implementations(model: PreTrainedModel) -> list[tuple[Any, str | None]]:
    """Every config of `attention_configs` with the attention implementation that it names."""
    return [(config, config._attn_implementation) for config in attention_configs(model)]


def set_implementations(names: list[tuple[Any, str | None]]) -> None:
    """Set the implementation of each config alone; the setter of transformers would change its sub-configs too."""
    for config, name in names:
        config._attn_implementation_internal = name


@contextmanager
def implementations_kept(model: PreTrainedModel) -> Iterator[None]:
    """Restore the attention implementation of every part of the model after the block."""
    before = implementations(model)
    try:
        yield
    finally:
        set_implementations(before)


def cache_layers(config: PreTrainedConfig, max_length: int | None = None) -> list[Any]:
    """The layers of transformers' own cache for a model, growing or of `max_length` tokens.

    Early releases have none for layers that share the keys of earlier layers, which come last.
    """
    return list((DynamicCache(config=config) if max_length is None else StaticCache(config, max_length)).layers)


def gguf_arguments() -> dict[str, Any]:
    """Arguments that make `from_pretrained` dequantise a GGUF file, which early releases do by default."""
    config = getattr(transformers, "GgufConfig", None)
    return {} if config is None else {"quantization_config": config(dequantize=True)}
