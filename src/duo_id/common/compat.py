"""The names of transformers that drift between its releases: no other module knows which release it runs on.

transformers 5.24 renamed `past_key_values` to `cache` in models, their outputs and `generate`; the old names last until
5.40 in models and 6.0 in `generate`. Code from a model's repository keeps the old name for longer.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import transformers
from torch import nn
from transformers import DynamicCache, GenerationMixin, PreTrainedConfig, PreTrainedModel, StaticCache

CACHE_NAMES = ("cache", "past_key_values")  # of the argument of a forward that takes the cache, newest first


def cache_argument(call: Callable[..., Any] | nn.Module) -> str:
    """The keyword under which a model, its forward or `generate` takes a cache."""
    names = inspect.signature(call.forward if isinstance(call, nn.Module) else call).parameters
    return next((name for name in CACHE_NAMES if name in names), GENERATE_CACHE)


def keeps_logits(model: nn.Module) -> bool:
    """Whether a model can be asked for the logits of some positions alone, by `logits_to_keep`."""
    return "logits_to_keep" in inspect.signature(model.forward).parameters


def given_cache(arguments: dict[str, Any]) -> Any:
    """The cache among the keyword arguments of a forward, under whichever name; None if there is none."""
    return next((arguments[name] for name in CACHE_NAMES if arguments.get(name) is not None), None)


def cache_of(output: Any) -> Any:
    """The cache in the output of a model or of `generate`; None if there is none."""
    return getattr(output, next((name for name in CACHE_NAMES if name in output), CACHE_NAMES[-1]), None)


GENERATE_CACHE = next(  # and of the arguments that `generate` hands around
    name for name in CACHE_NAMES if name in inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
)


def attention_configs(model: PreTrainedModel) -> list[Any]:
    """Every config of a model and of its parts, each of which names an attention implementation."""
    found: dict[int, Any] = {}
    todo = [part.config for part in model.modules() if isinstance(part, PreTrainedModel)]
    while todo:
        config = todo.pop()
        if id(config) not in found:
            found[id(config)] = config
            parts = (getattr(config, name, None) for name in getattr(config, "sub_configs", {}))
            todo += [part for part in parts if part is not None]
    return list(found.values())


def implementations(model: PreTrainedModel) -> list[tuple[Any, str | None]]:
    """Every config of `attention_configs` with the attention implementation that it names."""
    return [(config, config._attn_implementation) for config in attention_configs(model)]


def set_implementations(names: list[tuple[Any, str | None]]) -> None:
    """Let configs name these implementations; the setter of transformers would set those of their parts too."""
    for config, name in names:
        config._attn_implementation_internal = name


@contextmanager
def implementations_kept(model: PreTrainedModel) -> Iterator[None]:
    """Afterwards every part of the model has the attention implementation that it has now."""
    before = implementations(model)
    try:
        yield
    finally:
        set_implementations(before)


def cache_layers(config: PreTrainedConfig, max_length: int | None = None) -> list[Any]:
    """What transformers' own cache, growing or of `max_length` tokens, keeps for each layer of a model.

    Early releases keep nothing for layers that read the keys of others, which are the last ones.
    """
    return list((DynamicCache(config=config) if max_length is None else StaticCache(config, max_length)).layers)


def dequantising() -> dict[str, Any]:
    """Arguments for `from_pretrained` to give a GGUF file's weights as floats, which early releases do unasked."""
    config = getattr(transformers, "GgufConfig", None)
    return {} if config is None else {"quantization_config": config(dequantize=True)}
