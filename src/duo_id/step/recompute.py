"""Activation checkpointing of a frozen model that stays in eval mode, layer by layer.

transformers' own checkpointing acts only in train mode, which would switch on dropout and router noise.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from enum import IntEnum
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from duo_id.attention.interface import bound, bound_functions
from duo_id.attention.layers import AttentionLayer, layer_list, norms_and_mlp
from duo_id.attention.memo import Memo


class Keep(IntEnum):
    """What a transformer layer keeps for the backward pass; the rest is computed again."""

    ALL = 0
    ATTENTION = 1  # norms and MLP keep only their inputs
    OUTPUT = 2  # the layer keeps its input and what full attention gave: much work for few bytes
    INPUT = 3  # the layer keeps only its input


# What step.memory may say, of all layers, instead of how much there is.
FIXED = {"outputs": Keep.OUTPUT, "least": Keep.INPUT}


class Recomputation:
    """What each transformer layer keeps, which may change from step to step.

    Attributes:
        blocks: the transformer layers, in order.
        levels: what each keeps.
        noted: called with a layer's place and its memo once it has computed what that keeps.
    """

    def __init__(self, model: nn.Module, layers: Sequence[AttentionLayer], keep: Keep) -> None:
        stack = layer_list(layers[0].name)
        numbered = dict(model.get_submodule(stack).named_children())
        self.blocks = list(numbered.values())
        self.levels = [keep] * len(self.blocks)
        self.noted: Callable[[int, Memo], None] = lambda place, memo: None
        self.attention = [
            [layer for layer in layers if layer.name.startswith(f"{stack}.{number}.")] for number in numbered
        ]

    def regions(self) -> Iterator[tuple[nn.Module, int, tuple[Keep, ...]]]:
        """Each module that can be computed again, its layer's place, and the levels at which it is."""
        for place, (block, inside) in enumerate(zip(self.blocks, self.attention, strict=True)):
            yield block, place, (Keep.OUTPUT, Keep.INPUT)
            for part in norms_and_mlp(block, inside[0]) if inside else []:
                yield part, place, (Keep.ATTENTION,)


@contextmanager
def recomputed(model: nn.Module, layers: Sequence[AttentionLayer], keep: Keep = Keep.INPUT) -> Iterator[Recomputation]:
    """Let transformer layers keep less than all for a block.

    Args:
        model: the language model.
        layers: its attention layers that get gates, which say where the list of transformer layers is.
        keep: what all layers keep, until the levels that are yielded are changed.
    """
    chosen = Recomputation(model, layers, keep)
    regions = list(chosen.regions())
    own = {module: module.__dict__.get("forward") for module, _, _ in regions}  # such as a hook of accelerate
    try:
        for module, place, levels in regions:
            module.forward = _checkpointed(module.forward, chosen, place, levels)
        yield chosen
    finally:
        for module, forward in own.items():
            module.__dict__.pop("forward", None)
            if forward is not None:
                module.forward = forward


def _checkpointed(
    forward: Callable[..., Any], chosen: Recomputation, place: int, levels: Sequence[Keep]
) -> Callable[..., Any]:
    layers = chosen.attention[place]

    def run(*args: Any, **kwargs: Any) -> Any:
        level = chosen.levels[place]
        if not torch.is_grad_enabled() or level not in levels:
            return forward(*args, **kwargs)
        functions = bound_functions(layers)
        memo = Memo() if level == Keep.OUTPUT else None
        known = False

        def compute(*args: Any, **kwargs: Any) -> Any:
            # By the time of the backward pass other functions, or none, may be bound.
            with bound(layers, functions), nullcontext() if memo is None else memo.noting(replay=known):
                return forward(*args, **kwargs)

        found = checkpoint(compute, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)
        known = True
        if memo is not None:
            chosen.noted(place, memo)
        return found

    return run
