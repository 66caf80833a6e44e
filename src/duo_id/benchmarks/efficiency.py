"""How well several devices are used: tokens a second of each, over those of one device in another run."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from duo_id.config import require
from duo_id.errors import UserError

Place = tuple[int, str]  # context and blend


def read_baseline(run: str, results: Mapping[str, Any], places: list[Place]) -> dict[Place, float]:
    """Tokens a second of our step on one device, at the places for which its memory sufficed.

    Args:
        run: the folder of a run of the benchmark on one device, or its results.json: `compare`.
        results: of this run, of which model and device are looked at.
        places: what is measured.

    Raises:
        UserError: the run cannot be read, or it measured something else.
    """
    path = Path(run)
    try:
        found = json.loads((path / "results.json" if path.is_dir() else path).read_text())
        steps = {(row["context"], row["blend"]): row for row in found["rows"] if row.get("step") == "ours"}
        speeds = {place: float(row["tokens_per_s"]) for place, row in steps.items() if row["status"] != "OOM"}
        measured = found.get("devices", 1), found["model"]["name"], found["device"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"compare={run}: no results of task=train_step can be read there") from error
    expected = 1, results["model"]["name"], results["device"]
    require(
        measured == expected,
        f"compare={run}: measured on {_said(measured)}; efficiency is against {_said(expected)}",
    )
    for context, blend in places:
        require(
            (context, blend) in steps, f"compare={run}: it has no step of {context:,} tokens with the {blend} blend"
        )
    return speeds


def _said(measured: tuple[int, str, str]) -> str:
    return "{0} x {2} with {1}".format(*measured)
