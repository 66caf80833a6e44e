"""A language model whose KV heads get gates: what every method of identification works on."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from duo_id.attention.functions import Backends
from duo_id.attention.layers import AttentionLayer
from duo_id.attention.window import Window
from duo_id.models.language_model import LanguageModel
from duo_id.patterns.needs import SpanNeeds
from duo_id.patterns.pattern import HeadPattern


@dataclass(frozen=True)
class GatedModel:
    """A frozen model, the layers whose heads are told apart, and the window that streaming heads are left with.

    Attributes:
        model: frozen and attached (`duo_id.attention.interface.attached`).
        layers: its gated layers.
        window: what streaming heads see.
        backends: implementations of attention.
    """

    model: LanguageModel
    layers: Sequence[AttentionLayer]
    window: Window
    backends: Backends

    @property
    def shape(self) -> tuple[int, int]:
        """Gated layers and KV heads."""
        return len(self.layers), self.layers[0].kv_heads

    @property
    def pattern_shape(self) -> tuple[int, int]:
        """All layers, those without gates too, and KV heads."""
        return self.model.num_layers, self.layers[0].kv_heads

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.model.model.device

    def pattern(self, scores: Tensor, needs: SpanNeeds | None = None, **provenance: Any) -> HeadPattern:
        """Scores (gated layers, KV heads) as a pattern of the whole model; layers without gates are rows of 1.

        Args:
            scores: of the gated layers' heads.
            needs: of the same heads, if they are known.
            provenance: of the pattern.
        """
        gated = tuple(layer.index for layer in self.layers)
        rows = torch.ones(self.pattern_shape)
        rows[list(gated)] = scores.detach().float().cpu()
        if needs is not None:
            costs = torch.zeros(*self.pattern_shape, len(needs.levels))
            costs[list(gated)] = needs.costs
            needs = replace(needs, costs=costs)
        return HeadPattern(rows, self.window.sink_size, self.window.recent_size, gated, provenance, needs)
