"""Run folders as a report reads them, and runs put together that asked the same of the same model."""

import json
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from duo_id.common.documents import checked, read_object
from duo_id.common.errors import UserError
from duo_id.patterns.files import contents_of, load_pattern, pattern_name
from duo_id.patterns.provenance import Summary
from duo_id.report.rows import QUESTION, SAMPLE
from duo_id.report.summary import CONTENDER, load_results
from duo_id.train.plots import read_metrics

Place = tuple[Any, ...]  # of a sample: task, length and index
IDENTITY = [*QUESTION, *CONTENDER, "seed"]  # of a row


@dataclass(frozen=True)
class RunFolder:
    """What a run folder holds.

    Attributes:
        name: short, for headings.
        model: which one it was about.
        results: of an evaluation, as in results.json; None: it is a training run.
        summary: of a training run, as in summary.json.
        metrics: that training has logged, if any.
        patterns: by name, as in heads.json.
    """

    name: str
    model: dict[str, Any]
    results: dict[str, Any] | None = None
    summary: dict[str, Any] = field(default_factory=dict)
    metrics: pd.DataFrame | None = None
    patterns: dict[str, Any] = field(default_factory=dict)


def read_run(path: str | Path) -> RunFolder:
    """What a report needs of a run.

    Args:
        path: the folder of an evaluation or of a training run, or a `results.json`.

    Raises:
        UserError: it is neither, or has not come to its end.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path} is missing: give run folders of evaluate or train")
    if path.is_file() or (path / "results.json").exists() or not (path / "summary.json").exists():
        results = load_results(path)
        return RunFolder(pattern_name(path), results["model"], results, patterns=results["patterns"])
    summary = read_object(path / "summary.json")
    checked(Summary, summary, path / "summary.json")
    metrics = read_metrics(path) if any(path.glob("metrics/version_*/metrics.csv")) else None
    name = pattern_name(path).encode("utf-8", "replace").decode()  # a folder's name may hold any bytes
    return RunFolder(name, summary["model"], None, summary, metrics, {name: contents_of(load_pattern(path))})


def merge(runs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Results side by side: runs that asked the same of the same model become one, the others stay apart.

    Of rows in which one contender answers one question the last stays, or the last with a generated answer. Patterns
    of the same name that differ get a number. Where runs differ otherwise the first is believed; `all_settings` holds
    the settings of each.

    Args:
        runs: each as in results.json.
    """
    merged: list[_Merged] = []
    for run in runs:
        asked, samples = _asked(run), _samples(run)
        found = next((known for known in merged if known.takes(asked, samples)), None)
        if found is None:
            fresh: dict[str, Any] = {"rows": [], "patterns": {}, "contenders": [], "all_settings": []}
            found = _Merged(asked, {}, dict(run) | fresh)
            merged.append(found)
        found.samples.update(samples)
        into = found.results
        names = {name: free_name(name, pattern, into["patterns"]) for name, pattern in run["patterns"].items()}
        rows: dict[Hashable, Any] = {}
        for row in [*into["rows"], *(_renamed(row, names) for row in run["rows"])]:
            identity = tuple(row[column] for column in IDENTITY)
            if identity not in rows or row["text"] is not None or rows[identity]["text"] is None:
                rows[identity] = row
        into["rows"] = list(rows.values())
        into["patterns"] = into["patterns"] | {names[name]: pattern for name, pattern in run["patterns"].items()}
        told = [_renamed(contender, names) for contender in run["contenders"]]
        into["contenders"] = into["contenders"] + [
            contender for contender in told if contender not in into["contenders"]
        ]
        into["all_settings"] = [*into["all_settings"], run["settings"]]
    return [known.results for known in merged]


@dataclass
class _Merged:
    """Runs that have become one: what all of them asked, the digests of their samples, and the results so far."""

    asked: str
    samples: dict[Place, str]
    results: dict[str, Any]

    def takes(self, asked: str, samples: Mapping[Place, str]) -> bool:
        """Whether a run asked the same; a sample of one name may be another, as under another Python."""
        same = all(self.samples.get(place, digest) == digest for place, digest in samples.items())
        return asked == self.asked and same


def free_name(name: str, pattern: Mapping[str, Any], taken: Mapping[str, Any]) -> str:
    """`name`, with a number if a pattern other than this one has it; both as in heads.json."""
    number, free = 1, name
    while free in taken and _heads(taken[free]) != _heads(pattern):
        number += 1
        free = f"{name} [{number}]"
    return free


def _asked(run: Mapping[str, Any]) -> str:
    """What must be the same for two runs to be read as one, the window of the baselines among it."""
    first: Mapping[str, Any] = next(iter(run["patterns"].values()), {})
    window = first.get("sink_size"), first.get("recent_size")
    asked = [run.get(key) for key in ("model", "split", "seed", "chat_template")]
    return json.dumps([asked, window, [run["settings"].get(key) for key in ("data", "depths")]], sort_keys=True)


def _samples(run: Mapping[str, Any]) -> dict[Place, str]:
    return {tuple(row[column] for column in SAMPLE): row.get("sample", "") for row in run["rows"]}


def _renamed(row: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """A row or a contender, with the new name of its pattern."""
    return {**row, "heads": names.get(row["heads"], row["heads"]) if row["kind"] == "pattern" else row["heads"]}


def _heads(pattern: Mapping[str, Any]) -> list[Any]:
    return [pattern.get(key) for key in ("scores", "sink_size", "recent_size", "gated_layers")]
