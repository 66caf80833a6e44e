"""Ways to find heads side by side: what each loses at every sparsity, in what time, on tasks it was not found on."""

from collections.abc import Iterable, Mapping
from typing import Any

import pandas as pd

from duo_id.patterns.files import pattern_from_json
from duo_id.patterns.pattern import HeadPattern, average
from duo_id.report.summary import CONTENDER, contender_of, contenders, frame, name_of
from duo_id.report.tables import Cell, Grid, metric_cell

NEEDLES = ("needle-words", "needle-numbers", "needle-sentences", "passkeys")
ASKED = ("ruler-single", "ruler-multikey", "ruler-multivalue", "ruler-multiquery")
FAMILIES = {  # of each task to identify heads on: the held-out tasks that are like it
    "passkey": (*NEEDLES, *ASKED),
    "multi_query": (*NEEDLES, *ASKED),
    "key_value": ("json-lookup", *ASKED),
    "copying": ("copying", "list-reorder"),
    "text": ("language", "rare-ngrams"),
}


def leaderboards(results: Mapping[str, Any]) -> dict[str, Grid]:
    """Tables of the rise in answer loss, by title: over all tasks, out of family, and at each length.

    A task is out of family where no pattern of the results was found on its kind of task, so that all contenders are
    compared on the same cells. There are tables where several patterns stand beside each other.

    Args:
        results: as in results.json.
    """
    if len({contender_of(name) for name in results["patterns"]}) < 2:
        return {}
    rows, seconds = frame(results), seconds_of(results["patterns"])
    title = "Rise in answer loss over full attention (nats a token)"
    found = {f"{title}, all tasks": _grid(rows, seconds)}
    new = sorted(set(rows["task"]) - touched(results["patterns"].values()))
    if new and len(new) < rows["task"].nunique():
        found[f"{title}, out of family: {', '.join(new)}"] = _grid(rows[rows["task"].isin(new)], seconds)
    lengths = rows.groupby("length")["task"].nunique()
    of_many = sorted(lengths.index[lengths > 1])  # a task of one length of its own says nothing about length
    if len(of_many) > 1:
        found |= {f"{title}, {length:,} tokens": _grid(rows[rows["length"] == length], seconds) for length in of_many}
    return found


def touched(patterns: Iterable[Mapping[str, Any]]) -> set[str]:
    """The held-out tasks that are like those that patterns, as in heads.json, were found on."""
    found: set[str] = set()
    for pattern in patterns:
        data = (pattern["provenance"].get("settings") or {}).get("data") or {}
        mixed = {task for task, weight in (data.get("mixture") or {}).items() if weight}
        for task in mixed if data.get("task") == "mixture" else {data.get("task")}:
            found |= set(FAMILIES.get(str(task), ()))
    return found


def seconds_of(patterns: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """How long finding each contender's heads took, the mean over its seeds; those that say so."""
    told = [(contender_of(name), pattern["provenance"].get("seconds")) for name, pattern in patterns.items()]
    return (
        pd.DataFrame(told, columns=["heads", "seconds"])
        .astype({"seconds": float})
        .groupby("heads")["seconds"]
        .mean()
        .dropna()
        .to_dict()
    )


def averaged(patterns: Mapping[str, Mapping[str, Any]]) -> dict[str, HeadPattern]:
    """Patterns, as in heads.json, one for each contender: of several seeds, the mean."""
    seeds: dict[str, list[HeadPattern]] = {}
    for name, contents in patterns.items():
        seeds.setdefault(contender_of(name), []).append(pattern_from_json(dict(contents), name))
    return {name: average(found) for name, found in seeds.items()}


def _grid(rows: pd.DataFrame, seconds: Mapping[str, float]) -> Grid:
    """One line a contender, sparsities across; the least mean rise first."""
    found = contenders(rows)
    found = found[found["kind"] != "full"]
    sparsities = sorted(found["sparsity"].unique())
    lines = []
    for (kind, heads), own in found.groupby(CONTENDER[:2], sort=False):
        cells = own.set_index("sparsity").reindex(sparsities)
        took = seconds.get(heads) if kind == "pattern" else None
        time = Cell("-", float("inf")) if took is None else Cell(f"{took:.1f}", took)
        name = Cell(name_of(kind, heads, int(own["seeds"].max())))
        line = [name, time, *(metric_cell(row, "rise") for row in cells.to_dict("records"))]
        lines.append((cells["rise"].isna().any(), cells["rise"].mean(), line))
    headings = ["heads", "found in\nseconds", *(f"{100 * sparsity:.4g}%\nstream" for sparsity in sparsities)]
    return Grid(headings, {"": [line for *_, line in sorted(lines, key=lambda line: line[:2])]})
