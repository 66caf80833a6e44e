"""Which full attention a gate blends with streaming attention: one small function each.

A blend takes the student's full attention (a function, so that it is computed only if needed) and the teacher's
recorded output (batch, heads, tokens, head_dim), and returns the term that alpha multiplies.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Blend:
    """One way to blend.

    Attributes:
        full: returns the full attention term.
        needs_teacher: whether it needs the teacher's recorded attention outputs.
    """

    full: Callable[[Callable[[], Tensor], Tensor | None], Tensor]
    needs_teacher: bool = False


def student(attend: Callable[[], Tensor], teacher: Tensor | None) -> Tensor:
    """The student's full attention, over its own queries, keys and values (DuoAttention, equation 1)."""
    return attend()


def teacher(attend: Callable[[], Tensor], teacher: Tensor | None) -> Tensor:
    """The teacher's full attention output, without gradient, as DuoAttention's published code trains."""
    assert teacher is not None, "the teacher's attention outputs were not recorded"
    return teacher


@torch.no_grad()
def detached(attend: Callable[[], Tensor], teacher: Tensor | None) -> Tensor:
    """The student's full attention without a gradient: cheaper, and still computed from the student's own states."""
    return attend()


BLENDS = {"student": Blend(student), "detached": Blend(detached), "teacher": Blend(teacher, needs_teacher=True)}
