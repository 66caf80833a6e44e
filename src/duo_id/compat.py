"""The names of transformers that drift between its releases: no other module knows which release it runs on.

transformers 5.24 renamed `past_key_values` to `cache` in models, their outputs and `generate`.
"""

import inspect
from collections.abc import Callable
from typing import Any

from torch import nn
from transformers import GenerationMixin

CACHE_NAMES = ("cache", "past_key_values")  # of the argument of a forward that takes the cache, newest first


def cache_argument(call: Callable[..., Any] | nn.Module) -> str:
    """The keyword under which a model, its forward or `generate` takes a cache."""
    for known in (call.forward if isinstance(call, nn.Module) else call, GenerationMixin.prepare_inputs_for_generation):
        names = inspect.signature(known).parameters
        if found := next((name for name in CACHE_NAMES if name in names), None):
            return found
    return CACHE_NAMES[-1]


def cache_of(output: Any) -> Any:
    """The cache in the output of a model or of `generate`; None if there is none."""
    return getattr(output, next((name for name in CACHE_NAMES if name in output), CACHE_NAMES[-1]), None)
