"""Every method without training, by name, and how samples, progress and interruptions go with them."""

import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor

from duo_id.common.documents import Data, checked, read_json
from duo_id.common.documents import Natural as Count
from duo_id.common.documents import NonNegative as Positive
from duo_id.common.errors import UserError, check
from duo_id.common.files import write_text
from duo_id.common.integrity import sealed
from duo_id.data.samples import Sample
from duo_id.methods.attention_profile import attention_profile
from duo_id.methods.candidates import MaskLosses
from duo_id.methods.gated_model import Subject
from duo_id.methods.needles import NoNeedleError
from duo_id.methods.query_score import query_score
from duo_id.methods.reconstruction import reconstruction
from duo_id.methods.retrieval_score import retrieval_score
from duo_id.methods.saliency import saliency
from duo_id.methods.search import STRATEGIES, Order, from_scores, swap
from duo_id.methods.settings import ScoreSettings, SearchSettings
from duo_id.patterns.pattern import HeadPattern
from duo_id.step.objectives import make_objective

SCORES: dict[str, Callable[[Subject, Sample, Any], Tensor]] = {
    "attention_profile": attention_profile,
    "retrieval_score": retrieval_score,
    "query_score": query_score,
    "reconstruction": reconstruction,
    "saliency": saliency,
}
SETTLING = 1e-4  # below what one answer token is of all, so that two digits less are those of the score
ORDER = "search.json"  # in a run folder: how far a search has come
CPU_BATCH_TOKENS = 16384


class _Searched(Data):
    """What `ORDER` holds."""

    shape: Annotated[list[Count], Field(min_length=2, max_length=2)]
    first: list[Count]
    last: list[Count]
    hints: list[float]
    swaps: Count = 0
    seconds: Positive = 0.0


def mean_scores(subject: Subject, samples: Sequence[Sample], settings: ScoreSettings, console: Console) -> Tensor:
    """The mean over samples of the score that `settings.name` names: (gated layers, KV heads) float32 CPU.

    Of a score of two parts, (2, gated layers, KV heads), the second decides among heads whose means of the first are
    equal.
    Samples without what the score looks for, such as plain text in a mixture, do not count.

    Raises:
        UserError: there is none that has it.
    """
    found = []
    with _progress(console) as progress:
        bar = progress.add_task(settings.name, total=len(samples))
        for sample in samples:
            with suppress(NoNeedleError):
                found.append(SCORES[settings.name](subject, sample, settings))
            progress.advance(bar)
    check(
        bool(found),
        f"method={settings.name} needs samples whose answers stand in their contexts, and none of the method.samples="
        f"{settings.samples} is one: choose data=passkey",
    )
    scores = torch.stack(found)
    return settled(*scores.double().mean(0)) if scores.dim() == 4 else scores.mean(0)


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


def search_scores(
    subject: Subject,
    samples: Sequence[Sample],
    settings: SearchSettings,
    start: HeadPattern | None,
    folder: Path,
    console: Console,
) -> tuple[Tensor, dict[str, Any]]:
    """Scores by a search over masks, which are the places of the heads in its order.

    Args:
        subject: the model.
        samples: on which masks are compared.
        settings: of the search.
        start: a pattern whose order holds for the heads that are not searched.
        folder: where `search.json` tells the order so far; one that is there is gone on with.
        console: shows the progress.

    Returns:
        (gated layers, KV heads) in [0, 1], and what provenance says of the search.

    Raises:
        UserError: candidates do not fit the memory, or the saved order is one of another model.
    """
    order = Order(subject.shape)
    if start is not None:
        order = from_scores(start.scores[[layer.index for layer in subject.layers]], settings.between)
    path, before, began = folder / ORDER, 0.0, time.perf_counter()
    if path.is_file():
        order, before = _read(path, order)

    def decided(order: Order) -> None:
        state = {"shape": order.shape, "first": order.first, "last": order.last, "hints": order.hints.tolist()}
        seconds = before + time.perf_counter() - began
        write_text(path, json.dumps(sealed(state | {"swaps": order.swaps, "seconds": seconds})))
        progress.update(bar, completed=order.swaps or heads - len(order.open))

    heads, told = len(order.hints), dict[str, Any](samples=len(samples))
    streaming = round((settings.swap_at or 0.0) * heads)
    check(
        settings.swap_at is None or 0 < streaming < heads,
        f"method.swap_at={settings.swap_at} of {heads} heads leaves none to exchange",
    )
    distillation = subject.distillation(make_objective(settings.objective), settings.tokens)
    with _progress(console) as progress:
        bar = progress.add_task(settings.strategy, total=heads, completed=heads - len(order.open))
        batches = [subject.batch(sample) for sample in samples]
        share = max(len(batch["scored"]) / batch["input_ids"].shape[1] for batch in batches)
        fitting = batch_tokens_for(subject, share if distillation.objective.logits else 0.0)
        losses = MaskLosses(distillation, batches, settings.batch_tokens or fitting)
        STRATEGIES[settings.strategy](order, losses, settings.heads_per_round, decided)
        if settings.swap_at is not None:
            progress.update(bar, description="exchanging heads", total=settings.max_swaps, completed=0)
            swap(order, losses, streaming, settings.max_swaps, settings.swap_width, decided)
            told |= {"swaps": order.swaps, "budget": settings.swap_at}
    return order.scores(), told | {"forwards": round(losses.forwards, 1), "seconds_before": before}


def batch_tokens_for(subject: Subject, logits: float) -> int:
    """Tokens of candidates that a forward may hold: what takes about a third of a GPU's free memory.

    Args:
        subject: the model.
        logits: the fraction of the tokens whose logits are computed.
    """
    if subject.device.type != "cuda":
        return CPU_BATCH_TOKENS
    config = subject.model.model.config.get_text_config()
    width = 12 * config.hidden_size + 4 * (getattr(config, "intermediate_size", None) or 4 * config.hidden_size)
    width += round(logits * config.vocab_size)
    free = torch.cuda.mem_get_info(subject.device)[0]
    return max(1, int(free / 3 / width / subject.model.model.dtype.itemsize))


def _read(path: Path, expected: Order) -> tuple[Order, float]:
    """An order so far, and the seconds that it took."""
    try:
        state = checked(_Searched, read_json(path), path)
    except UserError as error:
        raise UserError(f"resume: {error}: delete it to start anew") from error
    hints = torch.tensor(state.hints)
    order = Order((state.shape[0], state.shape[1]), state.first, state.last, hints, state.swaps)
    whole = len(hints) == math.prod(order.shape) and sorted(order.all) == list(range(len(hints)))
    if order.shape != expected.shape:
        raise UserError(f"resume: {path} orders {order.shape} heads, this model has {expected.shape}")
    if not whole:
        raise UserError(f"resume: {path} does not name each head once: delete it to start anew")
    return order, state.seconds


@contextmanager
def _progress(console: Console) -> Iterator[Progress]:
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("left:"), TimeRemainingColumn())
    with Progress(TextColumn("{task.description}"), *columns, console=console, transient=True) as progress:
        yield progress
