"""Losses of many masks in few forwards: masks that agree on their first layers share the forward through these."""

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
from duo_id.common.errors import UserError, first_line
from duo_id.step.distillation import Distillation, Teacher
from duo_id.step.objectives import Outputs


@dataclass(frozen=True)
class PrefixTree:
    """The distinct prefixes of some masks: those that end at a layer are the batch rows of its forward.

    Attributes:
        masks: for each layer, (rows, KV heads) bool on the CPU.
        parents: for each layer, (rows,): the row of the previous layer that a row continues.
        rows: for each layer, (masks,): the row of each mask.
    """

    masks: list[Tensor]
    parents: list[Tensor]
    rows: list[Tensor]

    @property
    def size(self) -> int:
        """Rows of all layers: the cost of a forward, in forwards of one row through one layer."""
        return sum(map(len, self.masks))


def prefix_tree(masks: Tensor) -> PrefixTree:
    """The tree of (masks, layers, KV heads) bool on the CPU; masks that agree on layers 0 to l share a row up to l."""
    rows = torch.zeros(len(masks), dtype=torch.long)
    tree = PrefixTree([], [], [])
    for layer in masks.unbind(1):
        distinct, layer_rows = torch.unique(torch.cat([rows[:, None], layer.long()], 1), dim=0, return_inverse=True)
        tree.masks.append(distinct[:, 1:].bool())
        tree.parents.append(distinct[:, 0])
        tree.rows.append(layer_rows)
        rows = layer_rows
    return tree


def separate_rows(masks: Tensor) -> PrefixTree:
    """A tree in which nothing is shared: each mask is a row of its own from the first layer on."""
    rows = torch.arange(len(masks))
    return PrefixTree(list(masks.unbind(1)), [rows] * masks.shape[1], [rows] * masks.shape[1])


class UnsplitError(Exception):
    """A model passes something other than one row of hidden states per sample between its layers."""


class MaskLosses:
    """The objective under masks, mean over some samples, as `losses(masks)`.

    `forwards` counts the work done, in forwards of one sample through all gated layers, for comparing searches.
    Some models pass more than one row of hidden states per sample between their layers, such as several residual
    streams or earlier routing decisions. Rows cannot be split there, so masks share nothing, after a warning.
    """

    def __init__(self, distillation: Distillation, batches: Sequence[dict[str, Any]], batch_tokens: int) -> None:
        """Run the teacher on the samples.

        Args:
            distillation: the model and the objective.
            batches: of one sample each.
            batch_tokens: most tokens of one forward, over all its rows.
        """
        self.distillation, self.batch_tokens = distillation, batch_tokens
        self.samples = [(batch, distillation.teacher(batch)) for batch in batches]
        self.forwards, self.splits = 0.0, True

    @torch.no_grad()
    def __call__(self, masks: Tensor) -> Tensor:
        """Losses (masks,) float32 CPU of (masks, gated layers, KV heads) bool; masks may repeat."""
        distinct, inverse = torch.unique(masks.flatten(1), dim=0, return_inverse=True)
        distinct = distinct.view(-1, *masks.shape[1:])  # in lexicographic order: neighbours share the most layers
        total = torch.zeros(len(distinct))
        for batch, teacher in self.samples:
            rows_at_once = max(1, self.batch_tokens // batch["input_ids"].shape[1])
            total += torch.cat([self._of_sample(part, batch, teacher) for part in distinct.split(rows_at_once)])
        return total[inverse] / len(self.samples)

    def _of_sample(self, masks: Tensor, batch: dict[str, Any], teacher: Teacher) -> Tensor:
        try:
            tree, outputs = self._outputs(masks, batch)
        except torch.OutOfMemoryError as error:
            raise UserError(
                f"{len(masks)} candidates of {batch['input_ids'].shape[1]} tokens do not fit the device's memory: "
                f"lower method.batch_tokens={self.batch_tokens}"
            ) from error
        self.forwards += tree.size / masks.shape[1]
        student = _of_masks(outputs, tree)
        losses = self.distillation.chunked.loss(student, teacher.outputs or student, teacher.weights)
        return losses.float().cpu()

    def _outputs(self, masks: Tensor, batch: dict[str, Any]) -> tuple[PrefixTree, Outputs]:
        """The outputs of a sample under the masks, and the tree that leads to their rows."""
        if self.splits:
            tree = prefix_tree(masks)
            try:
                with branching(self.distillation, tree):
                    return tree, self.distillation.outputs(batch, candidates=True)
            except (torch.OutOfMemoryError, UserError):
                raise
            except (UnsplitError, LookupError, RuntimeError, ValueError) as error:
                failure = error
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
            message = first_line(failure)
            warnings.warn(
                f"candidates go through this model's layers one by one, which takes longer: {message}", stacklevel=2
            )
        return tree, outputs


@contextmanager
def branching(distillation: Distillation, tree: PrefixTree, split: bool = True) -> Iterator[None]:
    """Split a forward of one sample into the rows of a tree as it passes the gated layers, within the block.

    Args:
        distillation: the model.
        tree: the rows.
        split: whether the forward starts with one row instead of all.
    """
    layers = distillation.gated_model.layers
    functions = {
        layer.index: masked_rows(mask, distillation.gated_model.window, distillation.gated_model.backends)
        for layer, mask in zip(layers, tree.masks, strict=True)
    }
    splits = zip(
        blocks(distillation.gated_model.model.model, layers), tree.parents, [1, *map(len, tree.parents)], strict=False
    )
    hooks = [
        block.register_forward_pre_hook(_row_splitter(parents, rows), with_kwargs=True)
        for block, parents, rows in splits
        if split
    ]
    try:
        with bound(layers, functions):
            yield
    finally:
        for hook in hooks:
            hook.remove()


def _row_splitter(parents: Tensor, rows: int) -> Any:
    def expanded(states: Tensor) -> Tensor:
        if states.dim() != 3 or len(states) != rows:
            raise UnsplitError(f"they pass on states of shape {tuple(states.shape)}")
        return states[parents.to(states.device)]

    def hook(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if args:
            return (expanded(args[0]), *args[1:]), kwargs
        return args, kwargs | {"hidden_states": expanded(kwargs["hidden_states"])}

    return hook


def _of_masks(outputs: Outputs, tree: PrefixTree) -> Outputs:
    """Outputs with a leading dimension of masks, from outputs with one of rows, which differs between layers."""
    last = tree.rows[-1]
    rows = [last, *tree.rows[: len(outputs.layers)], last][: len(outputs.states)]
    return outputs.with_states(
        [states[row.to(states.device)] for states, row in zip(outputs.states, rows, strict=True)]
    )
