"""Activation checkpointing of a frozen model that stays in eval mode.

transformers' own checkpointing acts only in train mode, which would switch on dropout and router noise.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from duo_id.attention.gated import bound, bound_functions
from duo_id.attention.probe import AttentionLayer, layer_list


@contextmanager
def recomputed(model: nn.Module, layers: Sequence[AttentionLayer]) -> Iterator[None]:
    """Keep only the input of each transformer layer; the backward pass computes the rest again.

    Args:
        model: the language model.
        layers: its gated attention layers, which say where the list of transformer layers is.
    """
    stack = layer_list(layers[0].name)
    blocks = dict(model.get_submodule(stack).named_children())
    own = {block: block.__dict__.get("forward") for block in blocks.values()}  # such as a hook of accelerate
    try:
        for number, block in blocks.items():
            inside = [layer for layer in layers if layer.name.startswith(f"{stack}.{number}.")]
            block.forward = _checkpointed(block.forward, inside)
        yield
    finally:
        for block, forward in own.items():
            block.__dict__.pop("forward", None)
            if forward is not None:
                block.forward = forward


def _checkpointed(forward: Callable[..., Any], layers: Sequence[AttentionLayer]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        functions = bound_functions(layers)

        def again(*args: Any, **kwargs: Any) -> Any:
            # By the time of the backward pass other functions, or none, may be bound.
            with bound(layers, functions):
                return forward(*args, **kwargs)

        return checkpoint(again, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

    return run
