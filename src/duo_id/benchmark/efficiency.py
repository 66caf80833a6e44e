"""How well several devices are used: tokens a second of each, over those of one device in another run."""

from itertools import product
from pathlib import Path
from typing import Annotated, Any

import torch

from duo_id.benchmark.settings import BenchmarkSettings
from duo_id.benchmark.tables import Named
from duo_id.common.config import parse
from duo_id.common.documents import FIRST, Data, Line, Natural, NonNegative, checked, read_object
from duo_id.common.errors import UserError, check, one_line

Place = tuple[int, str]  # context and blend


class _Step(Data):
    """A row of task=train_step; one that ran out of memory has no speed."""

    step: Line
    context: Natural
    blend: Line
    status: Line
    tokens_per_s: NonNegative = 0.0


class _Run(Data):
    """What its results.json holds, as far as it is looked at."""

    rows: Annotated[list[_Step], FIRST]
    device: Line
    model: Named
    settings: dict[str, Any]
    devices: Natural = 1


def read_baseline(settings: BenchmarkSettings, device: torch.device, card: str, groups: int) -> dict[Place, float]:
    """Tokens a second of our step on one device, at the contexts and blends that it has been measured at.

    Args:
        settings: of this run; `compare` is the folder of the other, or its results.json.
        device: of this process.
        card: its name.
        groups: of devices that take different samples.

    Raises:
        UserError: the run cannot be read, or its steps do other work than those of this one.
    """
    path, refused = Path(str(settings.compare)), f"compare={settings.compare}"
    try:
        found = read_object(path / "results.json" if path.is_dir() else path)
        run = checked(_Run, found, path)
        steps = {(row.context, row.blend): row for row in run.rows if row.step == "ours"}
        speeds = {place: row.tokens_per_s for place, row in steps.items() if row.status != "OOM"}
        there = run.devices, run.device, run.model.name
        its = parse(BenchmarkSettings, run.settings)
        check(its.task == "train_step", f"task={its.task}")
        other = _work(its, device, 1)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{refused}: no results of task=train_step can be read there ({one_line(error)})") from error
    here = 1, card, settings.model.name
    told = "measured on {} x {} with {}; efficiency is against {} x {} with {}".format(*there, *here)
    check(there == here, f"{refused}: {told}")
    own = _work(settings, device, groups)
    for key in sorted(own | other):
        check(
            other.get(key) == own.get(key),
            f"{refused}: {key} is {other.get(key)} there and {own.get(key)} here, which is other work",
        )
    places = set(product(settings.context, settings.blend))
    check(
        bool(places & steps.keys()),
        f"{refused}: none of its steps has context={settings.context} and blend={settings.blend}",
    )
    return speeds


def _work(settings: BenchmarkSettings, device: torch.device, groups: int) -> dict[str, Any]:
    """What else than context and blend decides how much there is to compute, by override."""
    model, step = settings.model, settings.step
    return {f"model.architecture.{key}": value for key, value in (model.architecture | model.config).items()} | {
        "model.dtype": model.dtype,
        "step.shape": step.shape,
        "step.memory": step.memory,
        "step.full_backend": step.full_backend,
        "step.streaming_backend": step.streaming_backend,
        "compile": settings.compiles(device),
        "sink_size": settings.sink_size,
        "recent_size": settings.recent_size,
        "batch_size of each group of devices": settings.batch_size // groups,
    }
