"""torch.compile of what stands around attention: each layer's norms, MLP, projections and rotation.

Attention itself stays out: it is made of kernels already, and what a layer does is bound to its module, on which a
graph would be compiled again for every layer. All layers share a handful of graphs, and so do all lengths.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.fx.experimental._config as shapes
from transformers import AttentionInterface, PreTrainedModel

from duo_id.attention.interface import IMPLEMENTATION, attention_forward
from duo_id.attention.layers import AttentionLayer, blocks, norms_and_mlp


@contextmanager
def compiled_parts(
    model: PreTrainedModel,
    layers: Sequence[AttentionLayer],
    attention: bool = False,
    dynamic: bool = True,
    backend: Any = "inductor",
) -> Iterator[None]:
    """Compile norms and MLP of each layer for a block.

    Args:
        model: the model.
        layers: its attention layers.
        attention: also what the attention modules do before and after attention; the model must be attached.
        dynamic: one graph for all lengths, instead of one for each.
        backend: of torch.compile.
    """
    parts = [
        part for layer, block in zip(layers, blocks(model, layers), strict=True) for part in norms_and_mlp(block, layer)
    ]
    if attention:
        parts += [layer.module for layer in layers]
        AttentionInterface.register(IMPLEMENTATION, torch.compiler.disable(attention_forward))
    own = {part: part.__dict__.get("forward") for part in parts}  # such as a hook of accelerate
    torch._dynamo.reset()
    try:
        # A length that equals the hidden size would else be taken for the same number, and fixed.
        with shapes.patch(use_duck_shape=False):  # type: ignore[attr-defined]  # made when torch is imported
            for part in parts:
                part.forward = torch.compile(part.forward, dynamic=dynamic, backend=backend)
            yield
    finally:
        for part, forward in own.items():
            part.__dict__.pop("forward", None)
            if forward is not None:
                part.forward = forward
        if attention:
            AttentionInterface.register(IMPLEMENTATION, attention_forward)
        torch._dynamo.reset()
