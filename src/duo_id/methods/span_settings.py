"""Settings of method=spans."""

from dataclasses import field

from duo_id.common.config import Fraction, Named, Positive, Several, Some, settings
from duo_id.common.errors import check
from duo_id.methods.base_settings import ScoreSettings, Tokens, WithObjective, check_pair
from duo_id.step.choices import objective_weights


@settings("method")
class SpanSettings(WithObjective, ScoreSettings):
    """How far each head must see: spans within budgets, priced by backward passes."""

    devices = "one"

    objective: Named = "kl"  # a name, or weights of several
    tokens: Tokens = "labelled"
    levels: Several[Positive] = field(default_factory=list)  # spans in tokens; none: half the recent size, doubled
    budgets: Some[Fraction] = field(default_factory=lambda: [0.08, 0.6])  # shares of the cache, drawn log-uniformly
    curvature_samples: Positive = 8  # whose curvature at full attention prices spans at first

    def __post_init__(self) -> None:
        """Check what goes together."""
        objective_weights(self.objective)
        check_pair("budgets", self.budgets)
        check(self.budgets[0] > 0, f"method.budgets={self.budgets}: no cache is that small, give shares above 0")
        self.levels = sorted(set(self.levels))
        check(
            self.needs_teacher(),
            f"method.objective={self.objective} compares with nothing: spans are priced by the distance from full "
            "attention, so choose method.objective=kl or another with a teacher",
        )

    def levels_up_to(self, longest: int) -> tuple[int, ...]:
        """The spans to choose among on samples of up to `longest` tokens, ascending, -1 (all tokens) last.

        Raises:
            UserError: all samples fit the smallest.
        """
        doubled = [self.recent_size * 2**power // 2 for power in range(64)]
        levels = [span for span in self.levels or doubled if 0 < span < longest - self.sink_size]
        check(
            bool(levels),
            f"data.length_max: samples of {longest} tokens fit the sink and the smallest span; lower "
            f"{'method.levels' if self.levels else 'method.recent_size'}",
        )
        return (*levels, -1)
