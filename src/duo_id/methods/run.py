"""What every method is: a function from a gated model and samples to a head pattern."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console

from duo_id.data.datamodule import SampleModule
from duo_id.models.gated_model import GatedModel
from duo_id.patterns.pattern import HeadPattern
from duo_id.step.settings import StepSettings


@dataclass(frozen=True, kw_only=True)
class Run:
    """What a method may use of the run that it is part of, beside the model, the samples and its own settings.

    Attributes:
        seed: of whatever is drawn.
        folder: where progress is kept.
        resume: whether to continue from what is kept there.
        step: how a step is computed.
        console: shows the progress.
        accepted: to be called once the settings have proved to work, before the long part.
        partial: let an interrupted run return the pattern so far, with `interrupted` in its provenance.
        order: finds or reads the pattern that `method.start` or `method.prior` names, if it names one.
    """

    seed: int = 0
    folder: Path = Path()
    resume: bool = False
    step: StepSettings = field(default_factory=StepSettings)
    console: Console = field(default_factory=lambda: Console(quiet=True))
    accepted: Callable[[], None] = lambda: None
    partial: bool = False
    order: Callable[[], HeadPattern | None] = lambda: None


class Find(Protocol):
    """A method: `find` of the module that is named as `method=NAME`."""

    def __call__(self, gated_model: GatedModel, samples: SampleModule, settings: Any, run: Any, /) -> HeadPattern:
        """The pattern; its provenance says what the method alone knows.

        Args:
            gated_model: the model.
            samples: of the run's seed.
            settings: of the method.
            run: what else it may use, a `Run`.
        """
