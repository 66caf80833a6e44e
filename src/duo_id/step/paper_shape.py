"""A training step as DuoAttention's published code computes it: teacher and student in one batch."""

from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from duo_id.attention.full import full_attention
from duo_id.attention.functions import AttendFunction, gated_heads
from duo_id.attention.interface import bound
from duo_id.attention.softmax import Softmax
from duo_id.step.distillation import Batch, Distillation, Teacher
from duo_id.step.objectives import Outputs


class PaperShape(Distillation):
    """The step as DuoAttention's code computes it: teacher and student are two halves of one batch.

    The teacher's half is part of the autograd graph although it gets no gradient. Loss and gradients are those of
    `Distillation`.
    """

    def loss(self, alpha: Tensor, batch: Batch, teacher: Teacher | None = None) -> Tensor:
        """See `Distillation`; a given `teacher` is computed again all the same."""
        ids, mask, scored = batch["input_ids"], batch.get("attention_mask"), batch["scored"]
        doubled = dict(batch) | {
            "input_ids": torch.cat([ids, ids]),
            "attention_mask": None if mask is None else torch.cat([mask, mask]),
            "scored": torch.cat([scored, scored + ids.numel()]),
        }
        gated = {
            layer.index: self._halves(row, len(ids)) for layer, row in zip(self.gated_model.layers, alpha, strict=True)
        }
        with bound(self.gated_model.layers, gated):
            outputs = self.outputs(doubled)
        full, student = _split(outputs)
        weights = self._far_weights(batch, self.teacher(batch).outputs or full) if self.far else batch["weights"]
        return self.chunked.loss(student, full, weights)

    def _halves(self, alpha: Tensor, samples: int) -> AttendFunction:
        """Full attention for the first `samples` of the batch, gated attention for the rest."""

        def attend(query: Tensor, key: Tensor, value: Tensor, softmax: Softmax) -> Tensor:
            full = full_attention(
                query[:samples], key[:samples], value[:samples], softmax, self.gated_model.backends.full
            )
            gated = gated_heads(alpha, self.gated_model.window, self.blend, self.gated_model.backends, full.detach())
            return torch.cat([full, gated(query[samples:], key[samples:], value[samples:], softmax)])

        return attend


def _split(outputs: Outputs) -> tuple[Outputs, Outputs]:
    """The teacher's half, detached, and the student's."""

    def half(value: Any, number: int) -> Any:
        if isinstance(value, tuple):
            return tuple(half(item, number) for item in value)
        states = None if value is None else value.chunk(2)[number]
        return states if states is None or number else states.detach()

    first, second = (
        Outputs(**{item.name: half(getattr(outputs, item.name), number) for item in fields(Outputs)})
        for number in range(2)
    )
    return first, second


SHAPES: dict[str, type[Distillation]] = {"fast": Distillation, "paper": PaperShape}
