"""What is scored: a model whose attention is steered, and the windows that its heads may be left with."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from duo_id.attention.functions import Backends
from duo_id.attention.layers import AttentionLayer
from duo_id.attention.window import Window
from duo_id.data.samples import Sample, collate, with_scored
from duo_id.models.language_model import LanguageModel
from duo_id.step.distillation import Distillation
from duo_id.step.objectives import Objective


@dataclass(frozen=True)
class Subject:
    """A model to be scored.

    Attributes:
        model: frozen and attached (`duo_id.attention.interface.attached`).
        layers: those that get scores.
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
    def device(self) -> torch.device:
        """Where the model is."""
        return self.model.model.device

    def distillation(self, objective: Objective, tokens: str) -> Distillation:
        """The distance from full attention by an objective, with the student's own full attention in its gates."""
        return Distillation(self.model, self.layers, self.window, self.backends, objective, tokens)

    def batch(self, sample: Sample) -> dict[str, Any]:
        """One sample as a batch on the model's device."""
        made = with_scored(collate([sample], 0, "right"))
        return {key: value.to(self.device) if isinstance(value, Tensor) else value for key, value in made.items()}
