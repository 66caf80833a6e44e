"""Read run folders for a report, and merge evaluations of the same model under the same protocol."""

import json
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from duo_id.common.documents import checked, read_object
from duo_id.common.errors import UserError
from duo_id.patterns.files import contents_of
from duo_id.patterns.provenance import Summary
from duo_id.patterns.saved import load_pattern
from duo_id.patterns.sources import pattern_name
from duo_id.report.rows import ASKED, OF_PATTERNS, QUESTION, SAMPLE
from duo_id.report.summary import load_results
from duo_id.train.plots import read_metrics

SampleKey = tuple[Any, ...]  # task, length and index
IDENTITY = [*QUESTION, *ASKED]  # columns that identify a row


@dataclass(frozen=True)
class RunFolder:
    """The contents of a run folder.

    Attributes:
        name: short, for headings.
        model: its description.
        results: of an evaluation, as in results.json; None: a training run.
        summary: of a training run, as in summary.json.
        metrics: logged in training, if any.
        patterns: by name, as in heads.json.
    """

    name: str
    model: dict[str, Any]
    results: dict[str, Any] | None = None
    summary: dict[str, Any] = field(default_factory=dict)
    metrics: pd.DataFrame | None = None
    patterns: dict[str, Any] = field(default_factory=dict)


def read_run(path: str | Path) -> RunFolder:
    """Read what a report needs from a run.

    Args:
        path: the folder of an evaluation or of a training run, or a `results.json`.

    Raises:
        UserError: it is neither, or has not finished.
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
    """Merge runs of the same model under the same protocol; the others stay separate.

    Of several rows of one contender and question the last is kept, or the last with a generated answer. Different
    patterns of the same name are numbered. Otherwise the first run takes precedence; `all_settings` holds the settings
    of each.

    Args:
        runs: each as in results.json.
    """
    merged: list[_MergedRun] = []
    for run in runs:
        protocol, samples = _protocol(run), _samples(run)
        target = next((entry for entry in merged if entry.takes(protocol, samples)), None)
        if target is None:
            fresh: dict[str, Any] = {"rows": [], "patterns": {}, "contenders": [], "all_settings": []}
            target = _MergedRun(protocol, {}, dict(run) | fresh)
            merged.append(target)
        target.samples.update(samples)
        combined = target.results
        names = {name: free_name(name, pattern, combined["patterns"]) for name, pattern in run["patterns"].items()}
        rows: dict[Hashable, Any] = {}
        for row in [*combined["rows"], *(_renamed(row, names) for row in run["rows"])]:
            identity = tuple(row.get(column) for column in IDENTITY)
            if identity not in rows or row["text"] is not None or rows[identity]["text"] is None:
                rows[identity] = row
        combined["rows"] = list(rows.values())
        renamed_patterns = {names[name]: pattern for name, pattern in run["patterns"].items()}
        combined["patterns"] = combined["patterns"] | renamed_patterns
        renamed_contenders = [_renamed(contender, names) for contender in run["contenders"]]
        combined["contenders"] = combined["contenders"] + [
            contender for contender in renamed_contenders if contender not in combined["contenders"]
        ]
        combined["all_settings"] = [*combined["all_settings"], run["settings"]]
    return [entry.results for entry in merged]


@dataclass
class _MergedRun:
    """Merged runs: their protocol, the digests of their samples, and the results so far."""

    protocol: str
    samples: dict[SampleKey, str]
    results: dict[str, Any]

    def takes(self, protocol: str, samples: Mapping[SampleKey, str]) -> bool:
        """Whether a run has the same protocol and samples; samples of one key may differ between Python versions."""
        same_samples = all(self.samples.get(key, digest) == digest for key, digest in samples.items())
        return protocol == self.protocol and same_samples


def free_name(name: str, pattern: Mapping[str, Any], taken: Mapping[str, Any]) -> str:
    """`name`, numbered if a different pattern has it; patterns as in heads.json."""
    number, candidate = 1, name
    while candidate in taken and _heads(taken[candidate]) != _heads(pattern):
        number += 1
        candidate = f"{name} [{number}]"
    return candidate


def _protocol(run: Mapping[str, Any]) -> str:
    """What two runs must share to be merged, including the window of the baselines."""
    first: Mapping[str, Any] = next(iter(run["patterns"].values()), {})
    window = first.get("sink_size"), first.get("recent_size")
    protocol = [run.get(key) for key in ("model", "split", "seed", "chat_template")]
    return json.dumps([protocol, window, [run["settings"].get(key) for key in ("data", "depths")]], sort_keys=True)


def _samples(run: Mapping[str, Any]) -> dict[SampleKey, str]:
    return {tuple(row[column] for column in SAMPLE): row.get("sample", "") for row in run["rows"]}


def _renamed(row: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """A row or a contender, under the new name of its pattern."""
    return {**row, "heads": names.get(row["heads"], row["heads"]) if row["kind"] in OF_PATTERNS else row["heads"]}


def _heads(pattern: Mapping[str, Any]) -> list[Any]:
    return [pattern.get(key) for key in ("scores", "sink_size", "recent_size", "gated_layers", "needs")]
