"""Leaderboards of identification methods: loss at each budget, time taken, and tasks out of family."""

from collections.abc import Iterable, Mapping
from typing import Any

import pandas as pd

from duo_id.patterns.combining import average
from duo_id.patterns.pattern import HeadPattern
from duo_id.patterns.saved import pattern_from_json
from duo_id.report.budgets import budgets_of
from duo_id.report.rows import OF_PATTERNS
from duo_id.report.summary import CONTENDER, contender_of, contenders, frame, name_of
from duo_id.report.tables import Cell, Grid, metric_cell

TURNS = ("turns-words", "turns-numbers", "turns-mixed")
NEEDLES = ("needle-words", "needle-numbers", "needle-sentences", "passkeys", *TURNS)
RULER = ("ruler-single", "ruler-multikey", "ruler-multivalue", "ruler-multiquery")
FAMILIES = {  # of each identification task: the held-out tasks that resemble it
    "passkey": (*NEEDLES, *RULER),
    "multi_query": (*NEEDLES, *RULER),
    "key_value": ("json-lookup", "turns-json", *RULER),
    "copying": ("copying", "list-reorder", "table-reformat", "list-all"),
    "text": ("language", "rare-ngrams"),
    "turns": (*NEEDLES, *RULER, "json-lookup"),
    "self": ("language",),
}


def leaderboards(results: Mapping[str, Any]) -> dict[str, Grid]:
    """Tables of the rise in answer loss, by title: over all tasks, out of family, and at each length.

    A task is out of family if no pattern in the results was identified on a similar one, so that all contenders are
    compared on the same cells. Empty unless there are several patterns.

    Args:
        results: as in results.json.
    """
    if len({contender_of(name) for name in results["patterns"]}) < 2:
        return {}
    rows, seconds = frame(results), seconds_of(results["patterns"])
    title = "Rise in answer loss over full attention (nats per token)"
    tables = {f"{title}, all tasks": _grid(rows, seconds)}
    out_of_family = sorted(set(rows["task"]) - in_family_tasks(results["patterns"].values()))
    if out_of_family and len(out_of_family) < rows["task"].nunique():
        heading = f"{title}, out of family: {', '.join(out_of_family)}"
        tables[heading] = _grid(rows[rows["task"].isin(out_of_family)], seconds)
    lengths = rows.groupby("length")["task"].nunique()
    shared_lengths = sorted(lengths.index[lengths > 1])  # a task with a length of its own says nothing about length
    if len(shared_lengths) > 1:
        for length in shared_lengths:
            tables[f"{title}, {length:,} tokens"] = _grid(rows[rows["length"] == length], seconds)
    return tables


def in_family_tasks(patterns: Iterable[Mapping[str, Any]]) -> set[str]:
    """The held-out tasks that resemble those that patterns, as in heads.json, were identified on."""
    tasks: set[str] = set()
    for pattern in patterns:
        data = (pattern["provenance"].get("settings") or {}).get("data") or {}
        trained_tasks = {task for task, weight in (data.get("mixture") or {}).items() if weight}
        for task in trained_tasks if data.get("task") == "mixture" else {data.get("task")}:
            tasks |= set(FAMILIES.get(str(task), ()))
    return tasks


def seconds_of(patterns: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """Seconds that identifying each contender's heads took, the mean over its seeds, where recorded."""
    durations = [(contender_of(name), pattern["provenance"].get("seconds")) for name, pattern in patterns.items()]
    return (
        pd.DataFrame(durations, columns=["heads", "seconds"])
        .astype({"seconds": float})
        .groupby("heads")["seconds"]
        .mean()
        .dropna()
        .to_dict()
    )


def average_over_seeds(patterns: Mapping[str, Mapping[str, Any]]) -> dict[str, HeadPattern]:
    """Patterns, as in heads.json, one per contender: the mean over its seeds."""
    seeds: dict[str, list[HeadPattern]] = {}
    for name, contents in patterns.items():
        seeds.setdefault(contender_of(name), []).append(pattern_from_json(dict(contents), name))
    return {name: average(members) for name, members in seeds.items()}


def _grid(rows: pd.DataFrame, seconds: Mapping[str, float]) -> Grid:
    """One line per contender, budgets across; the smallest mean rise first."""
    statistics = contenders(rows)
    statistics = statistics[statistics["kind"] != "full"]
    budgets = budgets_of(rows)
    lines = []
    for (kind, heads), by_budget in statistics.groupby(CONTENDER[:2], sort=False):
        cells = by_budget.set_index("budget").reindex(budgets)
        duration = seconds.get(heads) if kind in OF_PATTERNS else None
        time = Cell("-", float("inf")) if duration is None else Cell(f"{duration:.1f}", duration)
        name = Cell(name_of(kind, heads, int(by_budget["seeds"].max())))
        line = [name, time, *(metric_cell(row, "rise") for row in cells.to_dict("records"))]
        lines.append((cells["rise"].isna().any(), cells["rise"].mean(), line))
    headings = ["heads", "found in\nseconds", *(budget.heading for budget in budgets)]
    return Grid(headings, {"": [line for *_, line in sorted(lines, key=lambda line: line[:2])]})
