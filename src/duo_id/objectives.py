"""What the student must match in the teacher, token by token: one small function each."""

from collections.abc import Callable

from torch import Tensor


def hidden_l2(student: Tensor, teacher: Tensor) -> Tensor:
    """Squared difference of the last hidden states, mean over the hidden size.

    Source: DuoAttention, section 2.2, equation 2; its mean over the scored tokens is the caller's.

    Args:
        student: (scored tokens, hidden size), after the model's final norm.
        teacher: the same of the model with full attention.

    Returns:
        (scored tokens,) float32.
    """
    return (student.float() - teacher.float()).square().mean(-1)


OBJECTIVES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"hidden_l2": hidden_l2}
