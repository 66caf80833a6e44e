"""Floors: the least time that a decode step or a prefill can take, from bytes and arithmetic over the ceilings.

Counted is what any implementation must do for a dense model: read weights and cached keys and values once per forward
pass, and the arithmetic of linear layers and attention. Norms, rotations, activations and cache writes are left out, so
no implementation can beat the floor on a machine at its ceilings.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from duo_id.attention.codes import bits_of, kept_bytes
from duo_id.attention.functions import Mask
from duo_id.attention.layers import AttentionLayer
from duo_id.benchmark.ceilings import Ceilings
from duo_id.models.quantised import linear_layers, stored
from duo_id.patterns.spans import ALL


@dataclass(frozen=True)
class Floor:
    """The least data movement and arithmetic of a run.

    Attributes:
        bytes: to read from the device's memory.
        flops: floating-point operations; a multiply-add counts as two.
    """

    bytes: int
    flops: int

    def seconds(self, ceilings: Ceilings) -> float:
        """The least time: memory and arithmetic can overlap, so the slower one counts."""
        return max(self.bytes / ceilings.bandwidth, self.flops / ceilings.flops)


@dataclass(frozen=True)
class Workload:
    """The sizes of a model that floors depend on.

    Attributes:
        layers: its attention layers.
        linear: weights of the linear layers but the last.
        head: weights of the last linear layer, from hidden state to logits.
        weights: bytes of all parameters except the embedding and the last layer, as they are stored.
        embedding: numbers in one row of the embedding.
        itemsize: bytes of a number in the cache, the embedding and the last layer.
    """

    layers: Sequence[AttentionLayer]
    linear: int
    head: int
    weights: int
    embedding: int
    itemsize: int

    def decode(self, batch: int, context: int, mask: Mask | None, kv: str = "exact") -> Floor:
        """One token for each of `batch` samples after `context` cached tokens; `mask` None: full attention."""
        numbers = self.head + batch * self.embedding
        read = operations = 0
        for layer, windows in zip(self.layers, self._windows(mask, context + 1), strict=True):
            visible = sum(heads * window for window, heads in windows.items())  # the new token's own key among them
            for window, heads in windows.items():
                read += batch * heads * self._kept(layer, window - 1, kv if window > context else "exact")
            operations += 4 * batch * layer.head_dim * (layer.heads // layer.kv_heads) * visible
        moved = self.weights + self.itemsize * numbers + read
        return Floor(moved, 2 * batch * (self.linear + self.head) + operations)

    def prefill(self, batch: int, context: int, chunk_size: int, mask: Mask | None, kv: str = "exact") -> Floor:
        """A prompt of `context` tokens in chunks, with the logits of its last token; `mask` None: full attention."""
        starts = range(0, context, chunk_size)
        numbers = self.head + batch * context * self.embedding
        operations, read = 2 * batch * (self.linear * context + self.head), 0
        for layer, windows in zip(self.layers, self._windows(mask, context), strict=True):
            for window, heads in windows.items():
                kept = kv if window == context else "exact"
                read += batch * heads * sum(self._kept(layer, min(start, window), kept) for start in starts)
                pairs = window * (window + 1) // 2 + (context - window) * window
                operations += 4 * batch * layer.head_dim * (layer.heads // layer.kv_heads) * heads * pairs
        return Floor(len(starts) * self.weights + self.itemsize * numbers + read, operations)

    def _kept(self, layer: AttentionLayer, tokens: int, kv: str) -> int:
        """Bytes of one head's keys and values of `tokens` tokens."""
        return kept_bytes(tokens, layer.head_dim, self.itemsize, bits_of(kv))

    def _windows(self, mask: Mask | None, tokens: int) -> list[Counter[int]]:
        """For each layer, how many of `tokens` tokens its KV heads see, and how many heads see as many."""
        if mask is None:
            return [Counter({tokens: layer.kv_heads}) for layer in self.layers]
        spans = mask.spans
        return [
            Counter(
                tokens if span == ALL else min(tokens, mask.sink_size + span) for span in spans[layer.index].tolist()
            )
            for layer in self.layers
        ]


def workload(model: PreTrainedModel, layers: Sequence[AttentionLayer]) -> Workload:
    """Count the parameters of a model.

    Args:
        model: a dense causal language model.
        layers: its attention layers.
    """
    embedding, output = model.get_input_embeddings().weight, model.get_output_embeddings()
    head = embedding if output is None else output.weight
    assert isinstance(embedding, torch.Tensor)
    assert isinstance(head, torch.Tensor)
    linear = sum(layer.in_features * layer.out_features for layer in linear_layers(model).values())
    saved = {id(tensor): tensor for tensor in model.state_dict(keep_vars=True).values()}
    inside = stored(tensor for key, tensor in saved.items() if key not in (id(head), id(embedding)))
    weights = sum(tensor.nbytes for tensor in inside)
    return Workload(layers, linear, head.numel(), weights, embedding.shape[1], embedding.element_size())
