"""Objectives of many tokens, some tokens at a time: the logits of all would take more memory than the model.

The gradient is computed along with the value, chunk by chunk, as in Liger's fused linear losses (Hsu et al. 2024, arXiv
2410.10989), so nothing of the size of the vocabulary is left for the backward pass. Ours is for any objective and any
model's head, soft caps included.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from duo_id.step.objectives import Objective, Outputs

ELEMENTS = 2**25  # of a chunk's largest tensor: with more, a GPU gets no faster
ELEMENT_BYTES = 24  # of logits, their float32 distributions, products and gradients, as measured on a GPU

Head = Callable[[Tensor], Tensor]  # from last hidden states (..., n, hidden size) to logits (..., n, vocabulary)


@dataclass(frozen=True)
class ChunkedObjective:
    """An objective of which logits exist only for a chunk of tokens, in the forward and in the backward pass.

    Attributes:
        objective: compares student and teacher token by token.
        head: computes logits.
        vocabulary: their number for a token.
    """

    objective: Objective
    head: Head
    vocabulary: int

    def loss(self, student: Outputs, teacher: Outputs, weights: Tensor) -> Tensor:
        """The weighted sum over the tokens, (...) float32, with its gradient.

        Args:
            student: (..., n) outputs.
            teacher: (n,) outputs, which get no gradient; if it is the student, the objective compares with none.
            weights: (n,) float32.
        """
        if torch.is_grad_enabled() and any(states.requires_grad for states in student.states):
            loss: Tensor = _LossAndGradient.apply(self, student, teacher, weights, *student.states)
            return loss
        return (self.values(student, teacher) * weights).sum(-1)

    @torch.no_grad()
    def values(self, student: Outputs, teacher: Outputs) -> Tensor:
        """The objective at each token, (..., n) float32, without a gradient."""
        pairs = ((student[chunk], None if teacher is student else teacher[chunk]) for chunk in self.chunks(student))
        return torch.cat([self.compare(*pair) for pair in pairs], -1)

    def chunks(self, outputs: Outputs) -> Iterator[slice]:
        """The tokens in chunks, at least one."""
        tokens, width = outputs.hidden.shape[-2:]
        candidates = math.prod(outputs.hidden.shape[:-2])
        widest = max(width * (1 + len(outputs.layers)), self.vocabulary * self.objective.logits)
        size = max(1, ELEMENTS // (candidates * widest))
        return (slice(start, start + size) for start in range(0, max(tokens, 1), size))

    def compare(self, student: Outputs, teacher: Outputs | None) -> Tensor:
        """The objective at a chunk's tokens, of which logits are computed; None: an objective without a teacher."""
        student = self._with_logits(student)
        return self.objective(student, student if teacher is None else self._with_logits(teacher))

    def _with_logits(self, outputs: Outputs) -> Outputs:
        if not self.objective.logits or outputs.predicting is None:
            return outputs
        return replace(outputs, logits=self.head(outputs.predicting))


class _LossAndGradient(torch.autograd.Function):
    """The loss and, in the same pass, its gradient: a token's part of both depends on this token's states alone."""

    @staticmethod
    def forward(
        ctx: Any, chunked: ChunkedObjective, student: Outputs, teacher: Outputs, weights: Tensor, *states: Tensor
    ) -> Tensor:
        losses, gradients = [], []
        for chunk in chunked.chunks(student):
            leaves = [part[..., chunk, :].detach().requires_grad_() for part in states]
            theirs = None if teacher is student else teacher[chunk]
            # Nothing saved here lasts until the backward pass, so hooks on saved tensors need not see it.
            with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(_unchanged, _unchanged):
                values = chunked.compare(student[chunk].with_states(leaves), theirs)
                loss = (values * weights[chunk]).sum(-1)
                gradients.append(torch.autograd.grad(loss.sum(), leaves, allow_unused=True))
            losses.append(loss.detach())
        ctx.save_for_backward(
            *(None if parts[0] is None else torch.cat(parts, -2) for parts in zip(*gradients, strict=True))
        )
        return torch.stack(losses).sum(0)

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        gradients = [
            None if part is None else part * outer[0].to(part.dtype)[..., None, None] for part in ctx.saved_tensors
        ]
        return None, None, None, None, *gradients


def _unchanged(tensor: Tensor) -> Tensor:
    return tensor
