"""Search over masks, resumable: each decision is saved in the run folder."""

import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field
from rich.console import Console

from duo_id.common.documents import Data, Natural, NonNegative, checked, read_json
from duo_id.common.errors import UserError, check
from duo_id.common.files import write_text
from duo_id.common.integrity import sealed
from duo_id.common.progress import progress_bar
from duo_id.data.datamodule import SampleModule
from duo_id.data.samples import Sample, batch_of_one
from duo_id.methods.candidates import MaskLosses
from duo_id.methods.head_order import STRATEGIES, HeadOrder, from_scores, swap
from duo_id.methods.run import Run
from duo_id.methods.settings import SearchSettings
from duo_id.models.gated_model import GatedModel
from duo_id.patterns.pattern import HeadPattern
from duo_id.step.distillation import Distillation

SEARCH_FILE = "search.json"  # in a run folder: a search's state
CPU_BATCH_TOKENS = 16384


class _SearchState(Data):
    """The content of `SEARCH_FILE`."""

    shape: Annotated[list[Natural], Field(min_length=2, max_length=2)]
    first: list[Natural]
    last: list[Natural]
    hints: list[float]
    swaps: Natural = 0
    seconds: NonNegative = 0.0


def find(gated_model: GatedModel, samples: SampleModule, settings: SearchSettings, run: Run) -> HeadPattern:
    """Search over masks: the scores are the ranks of the heads in the final order."""
    run.on_accepted()
    training_samples = samples.samples("train", settings.samples)
    if not run.resume:
        (run.folder / SEARCH_FILE).unlink(missing_ok=True)  # of an earlier run in this folder
    start = run.named_pattern()
    return search(gated_model, training_samples, settings, start, run.folder, run.console, run.partial)


def search(
    gated_model: GatedModel,
    samples: Sequence[Sample],
    settings: SearchSettings,
    start: HeadPattern | None,
    folder: Path,
    console: Console,
    partial: bool = False,
) -> HeadPattern:
    """Search on some samples; the pattern's provenance counts forwards and exchanges.

    Args:
        gated_model: the model.
        samples: on which masks are compared.
        settings: of the search.
        start: a pattern that orders the heads outside `settings.between`.
        folder: `search.json` in it holds the order so far, from which a resumed search continues.
        console: shows the progress.
        partial: see `Run`.

    Returns:
        a pattern with scores in [0, 1].

    Raises:
        UserError: the candidates do not fit into memory, or the saved order belongs to another model.
    """
    order = HeadOrder(gated_model.shape)
    if start is not None:
        order = from_scores(start.scores[[layer.index for layer in gated_model.layers]], settings.between)
    path, seconds_before, started = folder / SEARCH_FILE, 0.0, time.perf_counter()
    if path.is_file():
        order, seconds_before = _read_order(path, order)

    def save(order: HeadOrder) -> None:
        state = {
            "shape": order.shape,
            "first": order.stream_first,
            "last": order.stream_last,
            "hints": order.estimates.tolist(),
            "swaps": order.swaps,
            "seconds": seconds_before + time.perf_counter() - started,
        }
        write_text(path, json.dumps(sealed(state)))
        progress.update(bar, completed=order.swaps or heads - len(order.undecided))

    heads, provenance = len(order.estimates), dict[str, Any](samples=len(samples))
    streaming = round((settings.swap_at or 0.0) * heads)
    check(
        settings.swap_at is None or 0 < streaming < heads,
        f"method.swap_at={settings.swap_at} of {heads} heads leaves none to exchange",
    )
    distillation = Distillation(gated_model, settings.resolved_objective, settings.tokens)
    with progress_bar(console) as progress:
        bar = progress.add_task(settings.strategy, total=heads, completed=heads - len(order.undecided))
        batches = [batch_of_one(sample, gated_model.device) for sample in samples]
        losses = MaskLosses(distillation, batches, settings.batch_tokens or fitting_batch_tokens(gated_model))
        try:
            STRATEGIES[settings.strategy](order, losses, settings.heads_per_round, save)
            if settings.swap_at is not None:
                progress.update(bar, description="exchanging heads", total=settings.max_swaps, completed=0)
                swap(order, losses, streaming, settings.max_swaps, settings.swap_width, save)
                provenance |= {"swaps": order.swaps, "budget": settings.swap_at}
        except KeyboardInterrupt:
            if not partial:
                raise
            provenance["interrupted"] = True
    provenance |= {"forwards": round(losses.forwards, 1), "seconds_before": seconds_before}
    return gated_model.pattern(order.scores(), **provenance)


def fitting_batch_tokens(gated_model: GatedModel) -> int:
    """Tokens of candidates per forward that take about a third of the GPU's free memory."""
    if gated_model.device.type != "cuda":
        return CPU_BATCH_TOKENS
    config = gated_model.model.model.config.get_text_config()
    width = 12 * config.hidden_size + 4 * (getattr(config, "intermediate_size", None) or 4 * config.hidden_size)
    free = torch.cuda.mem_get_info(gated_model.device)[0]
    return max(1, int(free / 3 / width / gated_model.model.model.dtype.itemsize))


def _read_order(path: Path, expected: HeadOrder) -> tuple[HeadOrder, float]:
    """The saved order, and the seconds that it has taken."""
    try:
        state = checked(_SearchState, read_json(path), path)
    except UserError as error:
        raise UserError(f"resume: {error}: delete it to start anew") from error
    hints = torch.tensor(state.hints)
    order = HeadOrder((state.shape[0], state.shape[1]), state.first, state.last, hints, state.swaps)
    is_permutation = len(hints) == math.prod(order.shape) and sorted(order.ranking) == list(range(len(hints)))
    if order.shape != expected.shape:
        raise UserError(f"resume: {path} orders {order.shape} heads, this model has {expected.shape}")
    if not is_permutation:
        raise UserError(f"resume: {path} does not name each head once: delete it to start anew")
    return order, state.seconds
