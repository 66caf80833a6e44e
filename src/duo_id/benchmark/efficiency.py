"""Efficiency of several devices: tokens per second of each, relative to one device in another run."""

from itertools import product
from pathlib import Path
from typing import Annotated, Any

import torch

from duo_id.benchmark.settings import BenchmarkSettings
from duo_id.benchmark.tables import MeasuredModel
from duo_id.common.config import parse
from duo_id.common.documents import FIRST, Data, Line, Natural, NonNegative, checked, read_object
from duo_id.common.errors import UserError, check, one_line

StepKey = tuple[int, str]  # context length and blend


class _StepRow(Data):
    """A row of task=train_step; one that ran out of memory has no speed."""

    step: Line
    context: Natural
    blend: Line
    status: Line
    tokens_per_s: NonNegative = 0.0


class _BaselineRun(Data):
    """The baseline's results.json, as far as it is read."""

    rows: Annotated[list[_StepRow], FIRST]
    device: Line
    model: MeasuredModel
    settings: dict[str, Any]
    devices: Natural = 1


def read_baseline(settings: BenchmarkSettings, device: torch.device, card: str, groups: int) -> dict[StepKey, float]:
    """Tokens per second of our step on one device, by the context lengths and blends measured.

    Args:
        settings: of this run; `compare` is the folder of the baseline, or its results.json.
        device: of this process.
        card: its name.
        groups: of devices that take different samples.

    Raises:
        UserError: the run cannot be read, or its steps do different work from those of this one.
    """
    path, override = Path(str(settings.compare)), f"compare={settings.compare}"
    try:
        contents = read_object(path / "results.json" if path.is_dir() else path)
        run = checked(_BaselineRun, contents, path)
        steps = {(row.context, row.blend): row for row in run.rows if row.step == "ours"}
        speeds = {key: row.tokens_per_s for key, row in steps.items() if row.status != "OOM"}
        baseline_machine = run.devices, run.device, run.model.name
        baseline_settings = parse(BenchmarkSettings, run.settings)
        check(baseline_settings.task == "train_step", f"task={baseline_settings.task}")
        baseline_work = _work_settings(baseline_settings, device, 1)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{override}: cannot be read as results of task=train_step ({one_line(error)})") from error
    machine = 1, card, settings.model.name
    mismatch = "measured on {} x {} with {}; efficiency is against {} x {} with {}".format(*baseline_machine, *machine)
    check(baseline_machine == machine, f"{override}: {mismatch}")
    work = _work_settings(settings, device, groups)
    for key in sorted(work | baseline_work):
        check(
            baseline_work.get(key) == work.get(key),
            f"{override}: steps do different work, {key} is {baseline_work.get(key)} there and {work.get(key)} here",
        )
    keys = set(product(settings.context, settings.blend))
    check(
        bool(keys & steps.keys()),
        f"{override}: none of its steps has context={settings.context} and blend={settings.blend}",
    )
    return speeds


def _work_settings(settings: BenchmarkSettings, device: torch.device, groups: int) -> dict[str, Any]:
    """The settings besides context and blend that determine how much there is to compute, by override."""
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
