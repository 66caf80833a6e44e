"""A gated or masked model against its own full attention: what training, saliency and search all measure."""

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
from duo_id.step.chunks import ChunkedObjective
from duo_id.step.objectives import OBJECTIVES, Objective, Outputs

Batch = Mapping[str, Any]  # as `duo_id.data.samples.with_scored` returns it


@dataclass(frozen=True)
class Teacher:
    """Full attention's pass over a batch.

    Attributes:
        outputs: at the scored tokens; None where nothing needs them.
        weights: (scored tokens,) float32, the weight of each in the loss; they sum to 1 on average over processes.
        attention: the attention output of each gated layer, for blends that need it.
    """

    outputs: Outputs | None
    weights: Tensor
    attention: dict[int, Tensor] = field(default_factory=dict)


class Distillation:
    """The distance of a gated or masked model from full attention, by an objective at the scored tokens."""

    def __init__(
        self,
        gated_model: GatedModel,
        objective: Objective,
        tokens: str = "labelled",
        blend: Blend = BLENDS["student"],
    ) -> None:
        """Combine model, objective and blend.

        Args:
            gated_model: the frozen model.
            objective: compared token by token.
            tokens: the weights of scored tokens: `labelled`: all equal; `far`: by how much a token's loss falls when
                more than the windows is seen, so that plain text without a template shows which heads must look far.
            blend: which full attention gated heads are blended with.
        """
        if blend.needs_teacher and any(layer.sharers for layer in gated_model.layers):
            raise UserError(
                "method.blend=teacher: layers of this model share keys, so one gate would blend several teacher "
                "outputs; use method.blend=student"
            )
        self.gated_model, self.objective, self.far, self.blend = gated_model, objective, tokens == "far", blend
        self.chunked = self.in_chunks(objective)
        self.last = last_layer(gated_model.model.model, gated_model.layers)

    def loss(self, alpha: Tensor, batch: Batch, teacher: Teacher | None = None) -> Tensor:
        """The objective under gates, a weighted sum over the scored tokens: a scalar.

        Args:
            alpha: (gated layers, KV heads) float32.
            batch: samples, with `scored` and `weights`.
            teacher: of this batch; None: compute it.
        """
        teacher = teacher or self.teacher(batch)
        student = self.student(alpha, batch, teacher)
        return self.chunked.loss(student, teacher.outputs or student, teacher.weights)

    def student(self, alpha: Tensor, batch: Batch, teacher: Teacher) -> Outputs:
        """The gated model's outputs for a batch; for the arguments see `loss`."""
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
            return self.outputs(batch)

    @torch.no_grad()
    def teacher(self, batch: Batch) -> Teacher:
        """Full attention's pass over a batch, run only if anything needs it."""
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
                outputs = self.outputs(batch)
        weights = batch["weights"]
        if self.far:
            assert outputs is not None
            weights = self._far_weights(batch, outputs)
        return Teacher(outputs, weights, attention)

    def outputs(self, batch: Batch, candidates: bool = False) -> Outputs:
        """Outputs at the scored tokens, under whatever functions are bound to the attention layers.

        Args:
            batch: samples, with `scored`.
            candidates: the layers split the batch's one sample into several candidates, so everything returned has a
                leading dimension of candidates.
        """
        model, scored, tokens = self.gated_model.model, batch["scored"], batch["input_ids"].shape[1]
        with nullcontext() if candidates else self._last_at_scored(batch), self._captured() as (hidden, layers):
            model.hidden_states(dict(batch))

        def pick(states: Tensor) -> Tensor:
            return states[:, scored] if candidates else states.flatten(0, 1)[scored]

        predicting = None
        if self.objective.logits or self.far:
            last = hidden[0]
            predicting = last[:, (scored - 1) % tokens] if candidates else model.predicting(last, scored)
        targets = batch["input_ids"].flatten()[scored]
        return Outputs(pick(hidden[0]), tuple(pick(states) for states in layers), None, targets, predicting)

    def in_chunks(self, objective: Objective) -> ChunkedObjective:
        """An objective of this model's outputs, computed some tokens at a time."""
        model = self.gated_model.model
        return ChunkedObjective(objective, model.logits, model.vocabulary)

    @torch.no_grad()
    def _far_weights(self, batch: Batch, full: Outputs) -> Tensor:
        loss = self.in_chunks(OBJECTIVES["next_token"])
        streaming = {
            layer.index: streaming_heads(self.gated_model.window, self.gated_model.backends)
            for layer in self.gated_model.layers
        }
        with bound(self.gated_model.layers, streaming):
            near = self.outputs(batch)
        gain = (loss.values(near, near) - loss.values(full, full)).clamp(min=0) * batch["weights"]
        return gain / self.gated_model.model.ranks.mean(gain.sum()).clamp(min=1e-12)

    @contextmanager
    def _last_at_scored(self, batch: Batch) -> Iterator[None]:
        """Restrict the last layer to the scored tokens, and those that predict them, where these are few."""
        (samples, length), ranks = batch["input_ids"].shape, self.gated_model.model.ranks
        rows, tokens = batch["scored"] if ranks.group is None else batch.get("all_scored"), length * ranks.sequence
        if self.last is None or samples > 1 or rows is None or batch.get("attention_mask") is not None:
            yield
            return
        if self.objective.logits or self.far:  # for teacher and student alike: blends may mix both
            rows = torch.cat([rows, (rows - 1) % tokens])
        if not worth_splitting(rows, tokens):
            yield
            return
        own = rows - ranks.part * length  # other processes' tokens stand for the first here, so that nothing waits
        own = torch.where((own >= 0) & (own < length), own, 0)
        function = bound_functions([self.last])[self.last.index]
        with bound([self.last], {self.last.index: AtRows(function, rows, own)}):
            yield

    @contextmanager
    def _captured(self) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
        """Capture the last hidden states, and those after each gated layer, of the forward within the block."""
        hidden: list[Tensor] = []
        layers: list[Tensor] = []
        trunk = self.gated_model.model.trunk
        hooks = [trunk.register_forward_hook(lambda module, args, output: hidden.append(output.last_hidden_state))]
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


def _append(collected: list[Tensor]) -> Any:
    def hook(module: nn.Module, args: Any, output: Any) -> None:
        states = output if isinstance(output, Tensor) else output[0]
        if states.dim() != 3:
            raise UserError(
                f"method.objective: layers of this model return hidden states of shape {tuple(states.shape)}, not one "
                "per token; choose an objective that does not compare layers"
            )
        collected.append(states)

    return hook
