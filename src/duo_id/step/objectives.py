"""Distillation objectives: small functions, built in or a user's own, and weighted sums of them.

Each compares the student's outputs at the scored tokens with the teacher's and returns one float32 value per token,
(..., scored tokens); leading dimensions of the student (candidates) are kept.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pkgutil import resolve_name

import torch
import torch.nn.functional as F
from torch import Tensor

from duo_id.common.errors import UserError
from duo_id.step.choices import objective_weights


@dataclass(frozen=True)
class Outputs:
    """A forward's outputs at n scored tokens.

    Attributes:
        hidden: (..., n, hidden size), last hidden states after the final norm, at the scored tokens.
        layers: (..., n, hidden size) after each gated layer's transformer block, if an objective needs them.
        logits: (..., n, vocabulary) that predict the scored tokens, if an objective needs them; they are computed
            from `predicting` for some tokens at a time, see `duo_id.step.chunks`.
        targets: (n,), the scored tokens themselves.
        predicting: (..., n, hidden size), last hidden states that the scored tokens are predicted from.
    """

    hidden: Tensor
    layers: tuple[Tensor, ...] = ()
    logits: Tensor | None = None
    targets: Tensor | None = None
    predicting: Tensor | None = None

    @property
    def states(self) -> tuple[Tensor, ...]:
        """All hidden states."""
        return (self.hidden, *self.layers, *([] if self.predicting is None else [self.predicting]))

    def with_states(self, states: Sequence[Tensor]) -> "Outputs":
        """The same with other hidden states, in the order of `states`."""
        hidden, *others = states
        layers, predicting = others[: len(self.layers)], others[len(self.layers) :]
        return replace(self, hidden=hidden, layers=tuple(layers), predicting=predicting[0] if predicting else None)

    def __getitem__(self, tokens: slice) -> "Outputs":
        """The outputs at some of the scored tokens."""
        logits = None if self.logits is None else self.logits[..., tokens, :]
        targets = None if self.targets is None else self.targets[tokens]
        part = self.with_states([states[..., tokens, :] for states in self.states])
        return replace(part, logits=logits, targets=targets)


ObjectiveFunction = Callable[[Outputs, Outputs], Tensor]


@dataclass(frozen=True)
class Objective:
    """A function of student and teacher, and which outputs it needs.

    Attributes:
        function: maps student and teacher to (..., n) float32.
        layers: whether it needs the states after each layer.
        logits: whether it needs logits.
        teacher: whether it needs a teacher at all.
    """

    function: ObjectiveFunction
    layers: bool = False
    logits: bool = False
    teacher: bool = True

    def __call__(self, student: Outputs, teacher: Outputs) -> Tensor:
        """The value at each scored token."""
        return self.function(student, teacher)


def hidden_l2(student: Outputs, teacher: Outputs) -> Tensor:
    """Squared difference of the last hidden states, mean over the hidden size.

    Source: DuoAttention, section 2.2, equation 2; averaging over the scored tokens is left to the caller.
    """
    return _difference(student.hidden, teacher.hidden)


def relative_l2(student: Outputs, teacher: Outputs) -> Tensor:
    """`hidden_l2` in units of the teacher's mean square: tokens with large hidden states do not dominate."""
    return _relative(student.hidden, teacher.hidden)


def layer_l2(student: Outputs, teacher: Outputs) -> Tensor:
    """Relative squared difference after every gated layer, mean over the layers."""
    pairs = zip(student.layers, teacher.layers, strict=True)
    return torch.stack([_relative(student_states, teacher_states) for student_states, teacher_states in pairs]).mean(0)


def kl(student: Outputs, teacher: Outputs) -> Tensor:
    """KL divergence of the student's next-token distribution from the teacher's, in nats (Hinton et al. 2015)."""
    assert student.logits is not None
    assert teacher.logits is not None
    student_log, teacher_log = (F.log_softmax(outputs.logits.float(), -1) for outputs in (student, teacher))  # type: ignore[union-attr]
    return (teacher_log.exp() * (teacher_log - student_log)).sum(-1)


def next_token(student: Outputs, teacher: Outputs) -> Tensor:
    """Negative log-likelihood of the scored tokens, in nats: no teacher, as in PruLong (arXiv 2506.17121)."""
    assert student.logits is not None
    assert student.targets is not None
    log_probabilities = student.logits.float().log_softmax(-1)
    return -log_probabilities.gather(-1, student.targets.expand(log_probabilities.shape[:-1])[..., None])[..., 0]


def kl_next_token(student: Outputs, teacher: Outputs) -> Tensor:
    """`kl` plus 0.3 `next_token`: close to full attention and, among equally close masks, right about the text."""
    return kl(student, teacher) + 0.3 * next_token(student, teacher)


OBJECTIVES = {
    "hidden_l2": Objective(hidden_l2),
    "relative_l2": Objective(relative_l2),
    "layer_l2": Objective(layer_l2, layers=True),
    "kl": Objective(kl, logits=True),
    "next_token": Objective(next_token, logits=True, teacher=False),
    "kl_next_token": Objective(kl_next_token, logits=True),
}


def make_objective(chosen: str | Mapping[str, float]) -> Objective:
    """An objective by name, one of `OBJECTIVES` or MODULE.NAME, or the sum of several by their weights.

    Raises:
        UserError: there is no such objective, or a weight is not positive.
    """
    weights = objective_weights(chosen)
    parts = [(_named(name), weight) for name, weight in weights.items()]

    def weighted(student: Outputs, teacher: Outputs) -> Tensor:
        return torch.stack([weight * part(student, teacher) for part, weight in parts]).sum(0)

    return Objective(
        weighted if len(parts) > 1 or parts[0][1] != 1 else parts[0][0].function,
        layers=any(part.layers for part, _ in parts),
        logits=any(part.logits for part, _ in parts),
        teacher=any(part.teacher for part, _ in parts),
    )


def _named(name: str) -> Objective:
    """The objective of a name, or of a dotted name such as `my_module.my_objective`."""
    if name in OBJECTIVES:
        return OBJECTIVES[name]
    try:
        objective = resolve_name(str(name))
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"method.objective={name} cannot be imported from here: {error}") from error
    if not isinstance(objective, Objective):
        raise UserError(
            f"method.objective={name} is a {type(objective).__name__}, not a duo_id.step.objectives.Objective: wrap "
            "your function, as in Objective(function)"
        )
    return objective


def _difference(student: Tensor, teacher: Tensor) -> Tensor:
    return (student.float() - teacher.float()).square().mean(-1)


def _relative(student: Tensor, teacher: Tensor) -> Tensor:
    return _difference(student, teacher) / teacher.float().square().mean(-1).clamp(min=1e-12)
