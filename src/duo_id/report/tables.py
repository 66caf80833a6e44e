"""Statistics as tables: cells with intervals, laid out once for both the terminal and pages."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from duo_id.common.tables import TextTable
from duo_id.report.summary import REPORTED, Metric, contenders, frame, name_of

SHOWN = ("kept", "loss", "rise", "kl", "accuracy", "exact", "relative_score")  # metrics per contender
HEADINGS = {  # two short lines, so that the table fits a terminal
    "kept": "KV\nkept %",
    "loss": "answer\nloss",
    "rise": "rise\nin loss",
    "kl": "KL\nfrom full",
    "accuracy": "token\naccuracy %",
    "exact": "exact\nanswers %",
    "relative_score": "score\n/ full's %",
}
# The metric of full attention that each relative one refers to.
OF_FULL = {"relative_score": "score", "relative_accuracy": "accuracy", "rise": "loss"}
CAPTION = (
    "±: half of the 95% interval over samples (and seeds or random masks). Tasks weigh the same. "
    "Loss and KL in nats per token."
)


@dataclass(frozen=True)
class Cell:
    """One cell of a table.

    Attributes:
        text: without the interval.
        value: to sort by; None: sort by the text.
        ends: of the interval, as text; empty without one.
        spread: half the width of the interval, as text; empty without one.
        look: the cell's CSS class on a page: right | wrong | answer.
    """

    text: str
    value: float | None = None
    ends: tuple[str, ...] = ()
    spread: str = ""
    look: str = ""

    def __str__(self) -> str:
        return f"{self.text} ± {self.spread}" if self.spread else self.text


@dataclass(frozen=True)
class Grid:
    """A table: headings, and rows of cells by title of their section."""

    headings: Sequence[str]
    sections: Mapping[str, Sequence[Sequence[Cell]]]


def results_table(results: Mapping[str, Any] | pd.DataFrame, title: str) -> TextTable:
    """All contenders over all tasks, for the terminal.

    Args:
        results: as in results.json, or its rows as returned by `frame`.
        title: above the table.
    """
    return terminal_table(contender_grid(_rows(results)), title, CAPTION, leading=2)


def task_table(
    results: Mapping[str, Any] | pd.DataFrame, title: str, metric: str | None = None, sparsity: float | None = None
) -> TextTable:
    """One metric by task, contenders of one sparsity across, for the terminal.

    Args:
        results: as in results.json, or its rows as returned by `frame`.
        title: above the table.
        metric: one of `duo_id.report.summary.REPORTED`; None: see `headline`.
        sparsity: of the contenders; None: the one nearest 0.5.
    """
    rows = _rows(results)
    metric = metric or headline(rows)
    chosen_sparsity = middle(rows) if sparsity is None else sparsity
    title += f": {100 * chosen_sparsity:.4g}% of the KV heads stream" if chosen_sparsity else ""
    caption = f"{REPORTED[metric].label}; ±: half of the 95% interval over samples"
    return terminal_table(task_grid(rows, metric, chosen_sparsity), title, caption)


def contender_grid(rows: pd.DataFrame) -> Grid:
    """One line per contender: head patterns and their baselines, then token eviction at the same bytes."""
    statistics = contenders(rows)
    metrics = [metric for metric in SHOWN if metric in ("kept", "loss") or statistics[metric].notna().any()]
    sections: dict[str, list[list[Cell]]] = {}
    for row in statistics.to_dict("records"):
        section = "token eviction" if row["kind"] == "eviction" else "head patterns"
        name = Cell(name_of(row["kind"], row["heads"], row["seeds"]))
        stream = Cell(f"{100 * row['sparsity']:.4g}", row["sparsity"])
        cells = [name, stream, *(metric_cell(row, metric) for metric in metrics)]
        sections.setdefault(section, []).append(cells)
    return Grid(["heads", "stream\n%", *(HEADINGS[metric] for metric in metrics)], sections)


def task_grid(rows: pd.DataFrame, metric: str, sparsity: float) -> Grid:
    """One line per task: full attention in absolute terms, and `metric` of the contenders at one sparsity."""
    statistics = contenders(rows[(rows["kind"] == "full") | (rows["sparsity"] == sparsity)], ["task"])
    columns = statistics.drop_duplicates(["kind", "heads", "sparsity"])
    headings = ["task"]
    for row in columns.to_dict("records"):
        absolute = f"\n{REPORTED[OF_FULL[metric]].label}" if row["kind"] == "full" and metric in OF_FULL else ""
        headings.append(name_of(row["kind"], row["heads"], row["seeds"]) + absolute)
    lines = []
    for task in rows["task"].unique():
        by_contender = {
            (row["kind"], row["heads"], row["sparsity"]): row
            for row in statistics[statistics["task"] == task].to_dict("records")
        }
        cells = [Cell(name_of("task", task))]
        for kind, heads, stream in columns[["kind", "heads", "sparsity"]].itertuples(index=False):
            column_metric = OF_FULL.get(metric, metric) if kind == "full" else metric
            cells.append(metric_cell(by_contender.get((kind, heads, stream), {}), column_metric))
        lines.append(cells)
    return Grid(headings, {"": lines})


def metric_cell(row: Mapping[str, Any], metric: str) -> Cell:
    """The cell of one metric of a row of `summarise`; a dash where nothing was measured."""
    return interval_cell(row, metric, REPORTED[metric])


def interval_cell(row: Mapping[str, Any], name: str, form: Metric) -> Cell:
    """The cell of a row's value `name`, with its interval `name_low` to `name_high` if there is one."""
    value, low, high = (float(row.get(f"{name}{end}", np.nan)) for end in ("", "_low", "_high"))
    if not np.isfinite(value):
        return Cell("-", -np.inf)
    if not np.isfinite(low) or name == "kept" or low == high == value:  # bytes are exact
        return Cell(form.text(value), value)
    return Cell(form.text(value), value, (form.text(low), form.text(high)), form.text((high - low) / 2))


def headline(rows: pd.DataFrame) -> str:
    """The main metric: the score relative to full attention, or token accuracy if full attention scores nowhere."""
    full = rows["kind"] == "full"
    return "relative_score" if (rows.loc[full, "score"] > 0).any() else "relative_accuracy"


def middle(rows: pd.DataFrame) -> float:
    """The sparsity nearest 0.5; 0 for full attention alone."""
    sparsities = sorted(rows.loc[rows["kind"] != "full", "sparsity"].unique())
    return float(min(sparsities, key=lambda sparsity: abs(sparsity - 0.5))) if sparsities else 0.0


def _rows(results: Mapping[str, Any] | pd.DataFrame) -> pd.DataFrame:
    return results if isinstance(results, pd.DataFrame) else frame(results)


def terminal_table(grid: Grid, title: str, caption: str | None = None, leading: int = 1) -> TextTable:
    """A grid as a terminal table, without the ends of intervals; its first `leading` columns name the rows."""
    sections = {section: [list(map(str, cells)) for cells in lines] for section, lines in grid.sections.items()}
    return TextTable(grid.headings, sections, title, caption, leading)
