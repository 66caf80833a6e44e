"""Activation checkpointing, layer by layer, of a frozen model in eval mode.

transformers' own checkpointing works in train mode only, which would switch on dropout and router noise.
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
    """What a transformer layer keeps for the backward pass; the rest is recomputed."""

    ALL = 0
    ATTENTION = 1  # norms and MLP keep only their inputs
    OUTPUT = 2  # the layer keeps its input and full attention's output: much work saved for few bytes
    INPUT = 3  # the layer keeps only its input


# Values of step.memory that set one level for all layers, without a budget.
FIXED = {"outputs": Keep.OUTPUT, "least": Keep.INPUT}


class Recomputation:
    """What each transformer layer keeps, which may change from step to step.

    Attributes:
        blocks: the transformer layers, in order.
        levels: what each keeps.
        noted: called with a layer's index and its memo after the layer's forward.
        attention: the gated attention layers within each transformer layer.
    """

    def __init__(self, model: nn.Module, layers: Sequence[AttentionLayer], keep: Keep) -> None:
        stack = layer_list(layers[0].name)
        children = dict(model.get_submodule(stack).named_children())
        self.blocks = list(children.values())
        self.levels = [keep] * len(self.blocks)
        self.noted: Callable[[int, Memo], None] = lambda index, memo: None
        self.attention = [
            [layer for layer in layers if layer.name.startswith(f"{stack}.{number}.")] for number in children
        ]

    def regions(self) -> Iterator[tuple[nn.Module, int, tuple[Keep, ...]]]:
        """Each module that can be recomputed, its layer's index, and the levels at which it is."""
        for index, (block, attention) in enumerate(zip(self.blocks, self.attention, strict=True)):
            yield block, index, (Keep.OUTPUT, Keep.INPUT)
            for part in norms_and_mlp(block, attention[0]) if attention else []:
                yield part, index, (Keep.ATTENTION,)


@contextmanager
def activation_checkpointing(
    model: nn.Module, layers: Sequence[AttentionLayer], keep: Keep = Keep.INPUT
) -> Iterator[Recomputation]:
    """Let transformer layers keep less than everything within the block.

    Args:
        model: the language model.
        layers: its gated attention layers, whose names lead to the list of transformer layers.
        keep: the level of all layers, until the yielded levels are changed.
    """
    recomputation = Recomputation(model, layers, keep)
    regions = list(recomputation.regions())
    own_forwards = {module: module.__dict__.get("forward") for module, _, _ in regions}  # e.g. accelerate's hooks
    try:
        for module, index, levels in regions:
            module.forward = _checkpointed(module.forward, recomputation, index, levels)
        yield recomputation
    finally:
        for module, forward in own_forwards.items():
            module.__dict__.pop("forward", None)
            if forward is not None:
                module.forward = forward


def _checkpointed(
    forward: Callable[..., Any], recomputation: Recomputation, index: int, levels: Sequence[Keep]
) -> Callable[..., Any]:
    layers = recomputation.attention[index]

    def run(*args: Any, **kwargs: Any) -> Any:
        level = recomputation.levels[index]
        if not torch.is_grad_enabled() or level not in levels:
            return forward(*args, **kwargs)
        functions = bound_functions(layers)
        memo = Memo() if level == Keep.OUTPUT else None
        recomputing = False

        def compute(*args: Any, **kwargs: Any) -> Any:
            # By the backward pass other functions, or none, may be bound.
            with bound(layers, functions), nullcontext() if memo is None else memo.noting(replay=recomputing):
                return forward(*args, **kwargs)

        output = checkpoint(compute, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)
        recomputing = True
        if memo is not None:
            recomputation.noted(index, memo)
        return output

    return run
