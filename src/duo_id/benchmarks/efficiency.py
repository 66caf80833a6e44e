"""How well several devices are used: tokens a second of each, over those of one device in another run."""

import json
from itertools import product
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from duo_id.benchmarks.settings import BenchmarkSettings
from duo_id.config import parse, require
from duo_id.errors import UserError
from duo_id.foreign import literal
from duo_id.integrity import unsealed

Place = tuple[int, str]  # context and blend


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
        found = unsealed(json.loads((path / "results.json" if path.is_dir() else path).read_text()))
        steps = {(row["context"], row["blend"]): row for row in found["rows"] if row.get("step") == "ours"}
        speeds = {place: float(row["tokens_per_s"]) for place, row in steps.items() if row["status"] != "OOM"}
        there = found.get("devices", 1), found["device"], found["model"]["name"]
        its = parse(BenchmarkSettings, OmegaConf.create(literal(found["settings"])))
        require(its.task == "train_step", f"task={its.task}")
    except (UserError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{refused}: no results of task=train_step can be read there ({error})") from error
    here = 1, card, settings.model.name
    told = "measured on {} x {} with {}; efficiency is against {} x {} with {}".format(*there, *here)
    require(there == here, f"{refused}: {told}")
    other, own = _work(its, device, 1), _work(settings, device, groups)
    for key in sorted(own | other):
        require(
            other.get(key) == own.get(key),
            f"{refused}: {key} is {other.get(key)} there and {own.get(key)} here, which is other work",
        )
    places = set(product(settings.context, settings.blend))
    require(
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
