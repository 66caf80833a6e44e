"""What differs between the releases of transformers that are supported, each under one name."""

from __future__ import annotations

from typing import Any

import transformers
from transformers import DynamicCache, PreTrainedConfig, StaticCache

from duo_id.errors import UserError


def dequantising() -> dict[str, Any]:
    """Arguments for `from_pretrained` to give a GGUF file's weights as floats, which early releases do unasked."""
    config = getattr(transformers, "GgufConfig", None)
    return {} if config is None else {"quantization_config": config(dequantize=True)}


def cache_layers(config: PreTrainedConfig, max_length: int | None = None) -> list[Any]:
    """What transformers' own cache, growing or of `max_length` tokens, keeps for each layer of a model.

    Raises:
        UserError: layers read the keys of others, for which early releases keep nothing.
    """
    cache = DynamicCache(config=config) if max_length is None else StaticCache(config, max_cache_len=max_length)
    if len(cache.layers) < config.num_hidden_layers:
        raise UserError("layers of this model share keys and values, which the dual cache does not: use_cache=False")
    return list(cache.layers)
