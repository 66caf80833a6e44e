"""Methods whose scores are the mean of a score of each head over some samples."""

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from duo_id.common.errors import check
from duo_id.common.progress import progress_bar
from duo_id.data.datamodule import SampleModule
from duo_id.data.samples import Sample
from duo_id.methods.needles import NoNeedleError
from duo_id.methods.run import Find, Run
from duo_id.methods.settings import ScoreSettings
from duo_id.models.gated_model import GatedModel
from duo_id.patterns.pattern import HeadPattern

Score = Callable[[GatedModel, Sample, Any], Tensor]  # (gated layers, KV heads), or two such parts
TIE_RANGE = 1e-4  # far below one answer token's share of all, so that ties are broken without visibly changing a score


def mean_over_samples(score: Score) -> Find:
    """The method whose scores are the mean of `score` over `method.samples` training samples."""

    def find(gated_model: GatedModel, samples: SampleModule, settings: ScoreSettings, run: Run) -> HeadPattern:
        run.on_accepted()
        training_samples = samples.samples("train", settings.samples)
        return gated_model.pattern(mean_scores(score, gated_model, training_samples, settings, run.console))

    return find


def mean_scores(
    score: Score, gated_model: GatedModel, samples: Sequence[Sample], settings: ScoreSettings, console: Console
) -> Tensor:
    """The mean of a score over samples: (gated layers, KV heads) float32 CPU.

    If a score has two parts, (2, gated layers, KV heads), the second breaks ties between equal means of the first.
    Samples without answers in their context, such as plain text in a mixture, do not count.

    Raises:
        UserError: no sample has them.
    """
    scores = []
    with progress_bar(console) as progress:
        bar = progress.add_task(settings.name, total=len(samples))
        for sample in samples:
            with suppress(NoNeedleError):
                scores.append(score(gated_model, sample, settings))
            progress.advance(bar)
    check(
        bool(scores),
        f"method={settings.name} needs samples whose answers occur in their contexts, and none of the method.samples="
        f"{settings.samples} is one: choose data=passkey",
    )
    stacked = torch.stack(scores)
    return break_ties(*stacked.double().mean(0)) if stacked.dim() == 4 else stacked.mean(0)


def break_ties(scores: Tensor, tie_breaks: Tensor) -> Tensor:
    """Break ties between scores that are equal in float32.

    Each score is raised by `tie_breaks` times a small range, the same for all scores it ties with: `TIE_RANGE`, or
    half the gap to the next score if that is less. So different scores never change order, and 0.25 still reads as
    0.25. If seeds are averaged, heads that tie in all of them are ordered by their mean `tie_breaks`.

    Args:
        scores: of any shape, float64.
        tie_breaks: of the same shape, in [0, 1].

    Returns:
        float32.
    """
    values, group = scores.float().unique(return_inverse=True)  # ascending
    next_values = torch.cat([values[1:], torch.full((1,), torch.inf)])
    room = ((next_values.double() - values) / 2).clamp(max=TIE_RANGE)
    raised = (values.double()[group] + room[group] * tie_breaks).float()
    return raised.minimum(torch.nextafter(next_values, values)[group])  # rounding might reach the next score
