"""Objectives by name and weight, apart from the functions: a mistake is answered without importing torch."""

from collections.abc import Mapping
from typing import Any

from duo_id.common.errors import UserError

MAX_WEIGHT = 1e9  # of one objective or penalty in a sum
NEEDS_TEACHER = {  # the names of `duo_id.step.objectives`
    "hidden_l2": True,
    "relative_l2": True,
    "layer_l2": True,
    "kl": True,
    "next_token": False,
    "kl_next_token": True,
}


def objective_weights(chosen: Any) -> dict[str, float]:
    """The weight of each objective in a sum, by its name, or by MODULE.NAME, which may still not exist.

    Raises:
        UserError: there is no objective of a plain name, or a weight is not positive.
    """
    if isinstance(chosen, list):
        raise UserError(
            f"method.objective={chosen} must be a name, or weights of several such as {{kl: 1, layer_l2: 1}}"
        )
    weights = dict(chosen) if isinstance(chosen, Mapping) else {chosen: 1.0}
    if not weights:
        raise UserError(f"method.objective={{}}: choose one of {', '.join(NEEDS_TEACHER)}, or weights of several")
    for name, weight in weights.items():
        check_weight(weight, f"method.objective.{name}")
    for name in weights:
        if name not in NEEDS_TEACHER and "." not in str(name):
            raise UserError(
                f"method.objective={name}: choose one of {', '.join(NEEDS_TEACHER)}, or weights of several, or name an "
                "Objective of your own as MODULE.NAME"
            )
    return weights


def check_weight(weight: Any, override: str) -> None:
    """Raise a `UserError` unless a value is a positive weight whose products fit float32."""
    if not isinstance(weight, int | float) or isinstance(weight, bool) or not 0 < weight <= MAX_WEIGHT:
        raise UserError(f"{override}={weight!s:.80} must be a positive weight, at most {MAX_WEIGHT:g}")
