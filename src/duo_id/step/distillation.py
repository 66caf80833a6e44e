"""A frozen model beside its full attention: what training, saliency and search all measure."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from duo_id.attention.blends import BLENDS, Blend
from duo_id.attention.functions import AttendFunction, gated_heads, recording_heads, streaming_heads
from duo_id.attention.interface import bound, bound_functions
from duo_id.attention.last_layer import AtRows, last_layer, worth_splitting
from duo_id.attention.layers import blocks
from duo_id.common.errors import UserError
from duo_id.models.gated_model import GatedModel
from duo_id.step.objectives import OBJECTIVES, Objective, Outputs

Batch = Mapping[str, Any]  # with what `duo_id.data.samples.with_scored` adds


@dataclass(frozen=True)
class Teacher:
    """What full attention leaves of a batch.

    Attributes:
        outputs: at the scored tokens; None where nothing looks at them.
        weights: (scored tokens,) float32, what each counts; their sum is 1, in the mean over processes.
        attention: the output of each gated layer's attention, for blends that need it.
    """

    outputs: Outputs | None
    weights: Tensor
    attention: dict[int, Tensor] = field(default_factory=dict)


class Distillation:
    """How far a gated or masked model is from its full attention, by an objective at the scored tokens."""

    def __init__(
        self,
        gated_model: GatedModel,
        objective: Objective,
        tokens: str = "labelled",
        blend: Blend = BLENDS["student"],
    ) -> None:
        """Take the parts.

        Args:
            gated_model: the frozen model.
            objective: what is compared, token by token.
            tokens: what a scored token counts: `labelled`: each the same; `far`: as much as its loss falls by seeing
                more than the windows, for then plain text without a template tells which heads must look far.
            blend: which full attention enters gated heads.
        """
        if blend.needs_teacher and any(layer.sharers for layer in gated_model.layers):
            raise UserError(
                "method.blend=teacher: layers of this model share keys, so that a gate has several outputs of the "
                "teacher; use method.blend=student"
            )
        self.gated_model, self.objective, self.far, self.blend = gated_model, objective, tokens == "far", blend
        self.last = last_layer(gated_model.model.model, gated_model.layers)

    def loss(self, alpha: Tensor, batch: Batch, teacher: Teacher | None = None) -> Tensor:
        """The objective under gates, weighted over the scored tokens: a scalar.

        Args:
            alpha: (gated layers, KV heads) float32.
            batch: samples, with `scored` and `weights`.
            teacher: of this batch; None: it is computed.
        """
        teacher = teacher or self.teacher(batch)
        student = self.student(alpha, batch, teacher)
        return (self.objective(student, teacher.outputs or student) * teacher.weights).sum()

    def student(self, alpha: Tensor, batch: Batch, teacher: Teacher, logits: bool | None = None) -> Outputs:
        """What the gated model leaves of a batch: arguments as of `loss` and `outputs`."""
        gated = {
            layer.index: gated_heads(
                row[layer.own],
                self.gated_model.window,
                self.blend,
                self.gated_model.backends,
                teacher.attention.get(layer.index),
            )
            for layer, row in zip(self.gated_model.layers, alpha, strict=True)
        }
        with bound(self.gated_model.layers, gated):
            return self.outputs(batch, logits)

    @torch.no_grad()
    def teacher(self, batch: Batch) -> Teacher:
        """Full attention's pass over a batch, if anything looks at it."""
        attention: dict[int, Tensor] = {}
        record: dict[int, AttendFunction] = {}
        if self.blend.needs_teacher:
            record = {
                layer.index: recording_heads(attention, layer.index, self.gated_model.backends)
                for layer in self.gated_model.layers
            }
        outputs = None
        if self.objective.teacher or self.blend.needs_teacher or self.far:
            with bound(self.gated_model.layers, record):
                outputs = self.outputs(batch, logits=self.objective.logits or self.far)
        weights = batch["weights"]
        if self.far:
            assert outputs is not None
            weights = self._far_weights(batch, outputs)
        return Teacher(outputs, weights, attention)

    def outputs(self, batch: Batch, logits: bool | None = None, candidates: bool = False) -> Outputs:
        """What the model, doing what is bound to its attention at present, leaves at the scored tokens.

        Args:
            batch: samples, with `scored`.
            logits: whether to compute them; None: if the objective looks at them.
            candidates: the one sample of the batch has become several on its way through the layers, and so all that
                is returned has a leading dimension of them.
        """
        scored, tokens = batch["scored"], batch["input_ids"].shape[1]
        logits = self.objective.logits if logits is None else logits
        with nullcontext() if candidates else self._last_at_scored(batch, logits), self._caught() as (hidden, layers):
            found = None
            if not logits:
                self.gated_model.model.hidden_states(dict(batch))
            elif candidates:
                found = self.gated_model.model.logits(dict(batch), (scored - 1) % tokens)
            else:
                found = self.gated_model.model.predictions(dict(batch), scored)

        def pick(states: Tensor) -> Tensor:
            return states[:, scored] if candidates else states.flatten(0, 1)[scored]

        targets = batch["input_ids"].flatten()[scored]
        return Outputs(pick(hidden[0]), tuple(pick(states) for states in layers), found, targets)

    @torch.no_grad()
    def _far_weights(self, batch: Batch, full: Outputs) -> Tensor:
        loss = OBJECTIVES["next_token"]
        streaming = {
            layer.index: streaming_heads(self.gated_model.window, self.gated_model.backends)
            for layer in self.gated_model.layers
        }
        with bound(self.gated_model.layers, streaming):
            near = self.outputs(batch, logits=True)
        gain = (loss(near, near) - loss(full, full)).clamp(min=0) * batch["weights"]
        return gain / self.gated_model.model.ranks.mean(gain.sum()).clamp(min=1e-12)

    @contextmanager
    def _last_at_scored(self, batch: Batch, logits: bool) -> Iterator[None]:
        """Let the last layer compute the scored tokens, and those that predict them, alone, where these are few."""
        (samples, tokens), rows = batch["input_ids"].shape, batch["scored"]
        if logits or self.objective.logits or self.far:  # teacher and student alike, for blends with the teacher's
            rows = torch.cat([rows, (rows - 1) % tokens])
        whole = samples == 1 and batch.get("attention_mask") is None and self.gated_model.model.ranks.group is None
        if self.last is None or not whole or not worth_splitting(rows, tokens):
            yield
            return
        function = bound_functions([self.last])[self.last.index]
        with bound([self.last], {self.last.index: AtRows(function, rows)}):
            yield

    @contextmanager
    def _caught(self) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
        """The last hidden states, and those behind each gated layer, of the forward in the block."""
        hidden: list[Tensor] = []
        layers: list[Tensor] = []
        trunk = self.gated_model.model.trunk
        hooks = [trunk.register_forward_hook(lambda module, given, out: hidden.append(out.last_hidden_state))]
        if self.objective.layers:
            hooks += [
                block.register_forward_hook(_append(layers))
                for block in blocks(self.gated_model.model.model, self.gated_model.layers)
            ]
        try:
            yield hidden, layers
        finally:
            for hook in hooks:
                hook.remove()


def _append(found: list[Tensor]) -> Any:
    def hook(module: nn.Module, given: Any, out: Any) -> None:
        states = out if isinstance(out, Tensor) else out[0]
        if states.dim() != 3:
            raise UserError(
                f"method.objective: layers of this model return hidden states of shape {tuple(states.shape)}, not one "
                "a token, so choose an objective that does not compare them"
            )
        found.append(states)

    return hook
