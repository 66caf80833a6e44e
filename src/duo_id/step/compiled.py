"""torch.compile for everything around attention: each layer's norms, MLP, projections and rotation.

Attention itself is left out: it already consists of kernels, and its function is bound to each layer's module, so a
graph of it would be recompiled for every layer. All layers and all lengths share a handful of graphs.
"""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
import torch.fx.experimental._config as shapes
from transformers import AttentionInterface, PreTrainedModel

from duo_id.attention.interface import IMPLEMENTATION, attention_forward
from duo_id.attention.layers import AttentionLayer, blocks, norms_and_mlp

ROTATION = "apply_rotary_pos_emb"  # transformers' name for the rotation of queries and keys, in a model's own module


@contextmanager
def compiled_parts(
    model: PreTrainedModel,
    layers: Sequence[AttentionLayer],
    attention: bool = False,
    dynamic: bool = True,
    backend: Any = "inductor",
) -> Iterator[None]:
    """Compile the norms and MLP of each layer, and the rotation of queries and keys, within the block.

    Args:
        model: the model.
        layers: its attention layers.
        attention: compile the rotation with the attention modules' projections; the model must be attached. Otherwise
            the rotation is compiled by itself, if the model calls it by transformers' name.
        dynamic: one graph for all lengths instead of one per length.
        backend: of torch.compile.
    """
    parts = [
        part for layer, block in zip(layers, blocks(model, layers), strict=True) for part in norms_and_mlp(block, layer)
    ]
    if attention:
        parts += [layer.module for layer in layers]
        AttentionInterface.register(IMPLEMENTATION, torch.compiler.disable(attention_forward))
    rotations = {} if attention else _rotations(layers)
    own_forwards = {part: part.__dict__.get("forward") for part in parts}  # e.g. accelerate's hooks
    torch._dynamo.reset()
    try:
        # Duck shaping would identify a length with the hidden size where they are equal, and specialise on it.
        with shapes.patch(use_duck_shape=False):  # type: ignore[attr-defined]  # created when torch is imported
            for part in parts:
                part.forward = torch.compile(part.forward, dynamic=dynamic, backend=backend)
            for module, rotation in rotations.items():
                setattr(module, ROTATION, torch.compile(rotation, dynamic=dynamic, backend=backend))
            yield
    finally:
        for part, forward in own_forwards.items():
            part.__dict__.pop("forward", None)
            if forward is not None:
                part.forward = forward
        for module, rotation in rotations.items():
            setattr(module, ROTATION, rotation)
        if attention:
            AttentionInterface.register(IMPLEMENTATION, attention_forward)
        torch._dynamo.reset()


def _rotations(layers: Sequence[AttentionLayer]) -> dict[ModuleType, Any]:
    """The modules in which the layers' classes are defined, each with its function that rotates queries and keys."""
    modules = {sys.modules[type(layer.module).__module__] for layer in layers}
    return {module: getattr(module, ROTATION) for module in modules if hasattr(module, ROTATION)}
