"""The interface of a method: a function from a gated model and samples to a head pattern."""

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
    """What a method may use of its run, besides the model, the samples and its own settings.

    Attributes:
        seed: of all random draws.
        folder: where progress is saved.
        resume: whether to continue from the progress saved there.
        step: settings of a training step.
        console: shows the progress.
        on_accepted: called by the method once the settings have proved to work, before the long part.
        partial: let an interrupted run return the pattern so far, with `interrupted` in its provenance.
        named_pattern: computes or reads the pattern named by `method.start` or `method.prior`; None if neither is set.
    """

    seed: int = 0
    folder: Path = Path()
    resume: bool = False
    step: StepSettings = field(default_factory=StepSettings)
    console: Console = field(default_factory=lambda: Console(quiet=True))
    on_accepted: Callable[[], None] = lambda: None
    partial: bool = False
    named_pattern: Callable[[], HeadPattern | None] = lambda: None


class Find(Protocol):
    """A method: the function `find` of a module named as in `method=NAME`."""

    def __call__(self, gated_model: GatedModel, samples: SampleModule, settings: Any, run: Any, /) -> HeadPattern:
        """Find the pattern; its provenance holds what only the method knows.

        Args:
            gated_model: the model.
            samples: of the run's seed.
            settings: of the method.
            run: the rest, a `Run`.
        """
