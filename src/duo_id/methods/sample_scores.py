"""Methods that score each head on some samples, one by one: the scores are the mean."""

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
SETTLING = 1e-4  # below what one answer token is of all, so that two digits less are those of the score


def mean_over_samples(score: Score) -> Find:
    """The method whose scores are the mean of `score` over `method.samples` training samples."""

    def find(gated_model: GatedModel, samples: SampleModule, settings: ScoreSettings, run: Run) -> HeadPattern:
        run.accepted()
        chosen = samples.samples("train", settings.samples)
        return gated_model.pattern(mean_scores(score, gated_model, chosen, settings, run.console))

    return find


def mean_scores(
    score: Score, gated_model: GatedModel, samples: Sequence[Sample], settings: ScoreSettings, console: Console
) -> Tensor:
    """The mean of a score over samples: (gated layers, KV heads) float32 CPU.

    Of a score of two parts, (2, gated layers, KV heads), the second decides among heads whose means of the first are
    equal.
    Samples without what the score looks for, such as plain text in a mixture, do not count.

    Raises:
        UserError: there is none that has it.
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
        f"method={settings.name} needs samples whose answers stand in their contexts, and none of the method.samples="
        f"{settings.samples} is one: choose data=passkey",
    )
    stacked = torch.stack(scores)
    return settled(*stacked.double().mean(0)) if stacked.dim() == 4 else stacked.mean(0)


def settled(scores: Tensor, deciding: Tensor) -> Tensor:
    """Scores with an order among equal ones: by `scores`, and where these are equal in float32, by `deciding`.

    Each score rises by `deciding` times a little that is the same for its equals: `SETTLING`, or less where half the
    way to the next score is less. So no two different scores change places, and a score of 0.25 is still read as that.
    Where seeds are averaged, heads that are equal in all of them keep the order of their mean `deciding`.

    Args:
        scores: of any shape, float64.
        deciding: of the same shape, in [0, 1].

    Returns:
        float32.
    """
    values, which = scores.float().unique(return_inverse=True)  # ascending
    above = torch.cat([values[1:], torch.full((1,), torch.inf)])
    room = ((above.double() - values) / 2).clamp(max=SETTLING)
    risen = (values.double()[which] + room[which] * deciding).float()
    return risen.minimum(torch.nextafter(above, values)[which])  # rounding might reach the next
