"""What many masks cost, in few forwards: masks that agree on the first layers share their way through these."""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from duo_id.attention.functions import masked_rows
from duo_id.attention.interface import bound
from duo_id.attention.layers import blocks
from duo_id.common.errors import UserError
from duo_id.step.distillation import Distillation, Teacher
from duo_id.step.objectives import Outputs


@dataclass(frozen=True)
class PrefixTree:
    """The distinct beginnings of some masks, layer by layer: those of one layer are the rows of its forward.

    Attributes:
        masks: one (rows, KV heads) bool CPU tensor a layer.
        parents: one (rows,) a layer: the row of the layer before that a row goes on from.
        rows: one (masks,) a layer: the row of each of the masks.
    """

    masks: list[Tensor]
    parents: list[Tensor]
    rows: list[Tensor]

    @property
    def size(self) -> int:
        """Rows of all layers: what a forward costs, in forwards of one row through one layer."""
        return sum(map(len, self.masks))


def prefix_tree(masks: Tensor) -> PrefixTree:
    """The tree of (masks, layers, KV heads) bool CPU tensors.

    Masks that agree on layers 0 to l are one row up to layer l.
    """
    rows = torch.zeros(len(masks), dtype=torch.long)
    tree = PrefixTree([], [], [])
    for layer in masks.unbind(1):
        keys, found = torch.unique(torch.cat([rows[:, None], layer.long()], 1), dim=0, return_inverse=True)
        tree.masks.append(keys[:, 1:].bool())
        tree.parents.append(keys[:, 0])
        tree.rows.append(found)
        rows = found
    return tree


def separate_rows(masks: Tensor) -> PrefixTree:
    """The same where no mask shares anything: each is a row of its own from the first layer on."""
    rows = torch.arange(len(masks))
    return PrefixTree(list(masks.unbind(1)), [rows] * masks.shape[1], [rows] * masks.shape[1])


class UnsplitError(Exception):
    """Between the layers of a model lies something else than one row of states a sample."""


class MaskLosses:
    """The objective under masks, mean over some samples, as `losses(masks)`.

    `forwards` counts what was computed, in forwards of one sample through all gated layers, for comparing searches.
    Some models keep more than a row of states a sample between their layers, such as several streams of them or what
    routed the tokens before. Their rows cannot split there, so their masks share nothing, after a warning.
    """

    def __init__(self, distillation: Distillation, batches: Sequence[dict[str, Any]], batch_tokens: int) -> None:
        """Take the samples and compute full attention's passes over them.

        Args:
            distillation: the model and the objective.
            batches: one sample each.
            batch_tokens: tokens of all rows of a forward.
        """
        self.distillation, self.batch_tokens = distillation, batch_tokens
        self.samples = [(batch, distillation.teacher(batch)) for batch in batches]
        self.forwards, self.splits = 0.0, True

    @torch.no_grad()
    def __call__(self, masks: Tensor) -> Tensor:
        """Losses (masks,) float32 CPU of (masks, gated layers, KV heads) bool; equal masks may come more than once."""
        distinct, back = torch.unique(masks.flatten(1), dim=0, return_inverse=True)
        distinct = distinct.view(-1, *masks.shape[1:])  # in lexicographic order: neighbours share the most layers
        total = torch.zeros(len(distinct))
        for batch, teacher in self.samples:
            most = max(1, self.batch_tokens // batch["input_ids"].shape[1])
            total += torch.cat([self._of_sample(part, batch, teacher) for part in distinct.split(most)])
        return total[back] / len(self.samples)

    def _of_sample(self, masks: Tensor, batch: dict[str, Any], teacher: Teacher) -> Tensor:
        objective = self.distillation.objective
        try:
            tree, outputs = self._outputs(masks, batch)
        except torch.OutOfMemoryError as error:
            raise UserError(
                f"{len(masks)} candidates of {batch['input_ids'].shape[1]} tokens do not fit the device's memory: "
                f"lower method.batch_tokens={self.batch_tokens}"
            ) from error
        self.forwards += tree.size / masks.shape[1]
        losses = []
        for row in range(len(masks)):  # one by one: the logits of all in float32 would take more than the forward
            student = _of_row(outputs, row, tree)
            losses.append((objective(student, teacher.outputs or student) * teacher.weights).sum())
        return torch.stack(losses).float().cpu()

    def _outputs(self, masks: Tensor, batch: dict[str, Any]) -> tuple[PrefixTree, Outputs]:
        """What the masks leave of a sample, and how they came there."""
        if self.splits:
            tree = prefix_tree(masks)
            try:
                with branching(self.distillation, tree):
                    return tree, self.distillation.outputs(batch, candidates=True)
            except (torch.OutOfMemoryError, UserError):
                raise
            except (UnsplitError, LookupError, RuntimeError, ValueError) as error:
                reason = error
        tree = separate_rows(masks)
        repeated = {
            key: value.expand(len(masks), -1)
            for key, value in batch.items()
            if key in ("input_ids", "attention_mask") and value is not None
        }
        with branching(self.distillation, tree, split=False):
            outputs = self.distillation.outputs(batch | repeated, candidates=True)
        if self.splits:
            self.splits = False
            told = (str(reason).splitlines() or [type(reason).__name__])[0]
            warnings.warn(
                f"candidates go through this model's layers one by one, which takes longer: {told}", stacklevel=2
            )
        return tree, outputs


@contextmanager
def branching(distillation: Distillation, tree: PrefixTree, split: bool = True) -> Iterator[None]:
    """Let a forward of one sample split into the rows of a tree on its way through the gated layers.

    Args:
        distillation: the model.
        tree: the rows.
        split: whether the forward begins with one row, and not with all.
    """
    layers = distillation.gated_model.layers
    functions = {
        layer.index: masked_rows(mask, distillation.gated_model.window, distillation.gated_model.backends)
        for layer, mask in zip(layers, tree.masks, strict=True)
    }
    around = zip(
        blocks(distillation.gated_model.model.model, layers), tree.parents, [1, *map(len, tree.parents)], strict=False
    )
    hooks = [
        block.register_forward_pre_hook(_splitting(parents, before), with_kwargs=True)
        for block, parents, before in around
        if split
    ]
    try:
        with bound(layers, functions):
            yield
    finally:
        for hook in hooks:
            hook.remove()


def _splitting(parents: Tensor, before: int) -> Any:
    def grown(states: Tensor) -> Tensor:
        if states.dim() != 3 or len(states) != before:
            raise UnsplitError(f"states of shape {tuple(states.shape)} lie between them")
        return states[parents.to(states.device)]

    def hook(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if args:
            return (grown(args[0]), *args[1:]), kwargs
        return args, kwargs | {"hidden_states": grown(kwargs["hidden_states"])}

    return hook


def _of_row(outputs: Outputs, row: int, tree: PrefixTree) -> Outputs:
    """What one of the masks left, of outputs with a leading dimension of rows."""
    last = int(tree.rows[-1][row])
    layers = tuple(states[int(rows[row])] for states, rows in zip(outputs.layers, tree.rows, strict=False))  # if any
    logits = None if outputs.logits is None else outputs.logits[last]
    return Outputs(outputs.hidden[last], layers, logits, outputs.targets)
