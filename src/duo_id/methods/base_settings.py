"""What the settings of several methods share."""

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from duo_id.attention.window import Window
from duo_id.common.config import Count, Positive, Text, settings
from duo_id.common.errors import check
from duo_id.step.choices import NEEDS_TEACHER, objective_weights

if TYPE_CHECKING:
    from duo_id.step.objectives import Objective

Tokens = Literal["labelled", "far"]  # how scored tokens are weighted, see `duo_id.step.distillation`


@settings("method")
class MethodSettings:
    """Common to all methods."""

    name: Text
    sink_size: Count  # tokens
    recent_size: Positive  # tokens, including the query's own

    devices: ClassVar[Literal["one", "replicas", "shared"]] = "replicas"  # several devices all do the same, or share it

    @property
    def window(self) -> Window:
        """The window of streaming heads."""
        return Window(self.sink_size, self.recent_size)


class WithObjective:
    """Methods that measure the distance of a gated or masked model from full attention."""

    objective: Any

    @property
    def resolved_objective(self) -> "Objective":
        """The objective that `objective` names."""
        from duo_id.step.objectives import make_objective

        return make_objective(self.objective)

    def needs_teacher(self) -> bool:
        """Whether the objective needs a teacher; one of the user's own is imported to know.

        Raises:
            UserError: there is no such objective, or a weight is not positive.
        """
        weights = objective_weights(self.objective)
        if weights.keys() <= NEEDS_TEACHER.keys():
            return any(NEEDS_TEACHER[name] for name in weights)
        return self.resolved_objective.teacher


@settings("method")
class ScoreSettings(MethodSettings):
    """Methods that use some training samples without training."""

    samples: Positive = 8


def check_pair(key: str, values: list[float]) -> None:
    """Raise a `UserError` unless the values are two fractions in ascending order."""
    check(
        len(values) == 2 and values[0] <= values[1],
        f"method.{key}={values} must be two fractions from 0 to 1, in ascending order",
    )
