"""Statistics as tables: cells with intervals, laid out once for both the terminal and pages."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from duo_id.common.tables import TextTable
from duo_id.report.budgets import Budget, budgets_of
from duo_id.report.rows import THIRDS
from duo_id.report.summary import CONTENDER, REPORTED, Metric, contenders, frame, name_of

SHOWN = ("kept", "loss", "rise", "kl", "accuracy", "exact", "relative_score")  # metrics per contender
HEADINGS = {  # two short lines, so that the table fits a terminal
    "sparsity": "stream\n%",
    "cache": "cache\n%",
    "kept": "KV\nkept %",
    "loss": "answer\nloss",
    "rise": "rise\nin loss",
    "kl": "KL\nfrom full",
    "accuracy": "token\naccuracy %",
    "exact": "exact\nanswers %",
    "score": "score\n%",
    "relative_score": "score\n/ full's %",
    "agreed": "same\ntokens",
    "agreement": "same\nnext %",
    "along": "KL on\nfull's",
    "drift": "KL on\nown",
    "written": "length\n%",
    "repeated": "repeat\n%",
    "first_third": "first\nthird %",
    "middle_third": "middle\nthird %",
    "last_third": "last\nthird %",
}
OF_TEXTS = ("agreed", "agreement", "along", "drift", "written", "repeated")  # metrics of what contenders write
WRITTEN_TITLE = "What they write after each context, against what full attention writes"
TURNS_TITLE = "By turn of a conversation that keeps the model's answers (full attention: absolute)"
THIRDS_TITLE = "Right lines of long answers, by their place in the answer"
GENERATED_CAPTION = "Intervals: python -m duo_id.report RUN"
OF_TURNS = {  # sections of the table by turn: metrics relative to full attention, whose own line is absolute
    "relative_score": "score, % of full attention's",
    "rise": "rise in loss",
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
    grid = contender_grid(_rows(results))
    return terminal_table(grid, title, CAPTION, leading=list(grid.headings).index(HEADINGS["kept"]))


def task_table(
    results: Mapping[str, Any] | pd.DataFrame,
    title: str,
    metric: str | None = None,
    sparsity: float | None = None,
    cache: float | None = None,
) -> TextTable:
    """One metric by task, contenders of one budget across, for the terminal.

    Args:
        results: as in results.json, or its rows as returned by `frame`.
        title: above the table.
        metric: one of `duo_id.report.summary.REPORTED`; None: see `headline`.
        sparsity: of the contenders.
        cache: their share of the cache; both None: the budget nearest a half.
    """
    rows = _rows(results)
    metric = metric or headline(rows)
    budget = middle(rows) if sparsity is None and cache is None else Budget(sparsity, cache)
    title += "" if budget is None else f": {budget.in_words}"
    caption = f"{REPORTED[metric].label}; ±: half of the 95% interval over samples"
    return terminal_table(task_grid(rows, metric, budget), title, caption)


def contender_grid(
    rows: pd.DataFrame, always: Sequence[str] = ("kept", "loss"), shown: Sequence[str] = SHOWN[2:]
) -> Grid:
    """One line per contender: head patterns and their baselines, then token eviction at the same bytes.

    Args:
        rows: as returned by `frame`.
        always: metrics that have a column even where nothing was measured.
        shown: metrics that have one where something was.
    """
    statistics = contenders(rows)
    asked = asked_of(statistics)
    metrics = [*always, *(metric for metric in shown if statistics[metric].notna().any())]
    sections: dict[str, list[list[Cell]]] = {}
    for row in statistics.to_dict("records"):
        section = "token eviction" if row["kind"] == "eviction" else "head patterns"
        name = Cell(name_of(row["kind"], row["heads"], row["seeds"]))
        shares = [share_cell(row[column]) for column in asked]
        cells = [name, *shares, *(metric_cell(row, metric) for metric in metrics)]
        sections.setdefault(section, []).append(cells)
    return Grid(["heads", *(HEADINGS[column] for column in (*asked, *metrics))], sections)


def written_grid(rows: pd.DataFrame) -> Grid | None:
    """One line per contender that wrote: how its text compares with that of full attention; None where none did."""
    return contender_grid(rows[rows["written"].notna()], (), OF_TEXTS) if rows["written"].notna().any() else None


def thirds_grid(rows: pd.DataFrame) -> Grid | None:
    """One line per contender with long answers: the right pieces in each third of them; None where there are none."""
    long = rows[rows[THIRDS[0]].notna()]
    return contender_grid(long, ("kept", "score"), THIRDS) if len(long) else None


def turns_grid(rows: pd.DataFrame) -> Grid | None:
    """One line per contender that held conversations, one column per turn; None where none did."""
    rows = rows[rows["turn"].notna()]
    if rows.empty:
        return None
    statistics, of_turns = contenders(rows), contenders(rows, ["turn"])
    asked, turns = asked_of(statistics), sorted(of_turns["turn"].unique())
    sections: dict[str, list[list[Cell]]] = {}
    for metric, title in OF_TURNS.items():
        for row in statistics.to_dict("records"):
            own = of_turns[(of_turns[CONTENDER] == [row[column] for column in CONTENDER]).all(axis=1)].set_index("turn")
            shown = OF_FULL[metric] if row["kind"] == "full" else metric
            name = Cell(name_of(row["kind"], row["heads"], row["seeds"]))
            cells = [metric_cell(own.loc[turn].to_dict() if turn in own.index else {}, shown) for turn in turns]
            sections.setdefault(title, []).append([name, *(share_cell(row[column]) for column in asked), *cells])
    return Grid(["heads", *(HEADINGS[column] for column in asked), *(f"turn\n{turn:.0f}" for turn in turns)], sections)


def asked_of(statistics: pd.DataFrame) -> list[str]:
    """The columns of what contenders were asked to keep."""
    return [column for column in ("sparsity", "cache") if statistics[column].fillna(0).any() or column == "sparsity"]


def task_grid(rows: pd.DataFrame, metric: str, budget: Budget | None) -> Grid:
    """One line per task: full attention in absolute terms, and `metric` of the contenders at one budget."""
    statistics = contenders(rows[(rows["kind"] == "full") | (rows["budget"] == budget)], ["task"])
    columns = statistics.drop_duplicates(CONTENDER)
    headings = ["task"]
    for row in columns.to_dict("records"):
        absolute = f"\n{REPORTED[OF_FULL[metric]].label}" if row["kind"] == "full" and metric in OF_FULL else ""
        headings.append(name_of(row["kind"], row["heads"], row["seeds"]) + absolute)
    lines = []
    for task in rows["task"].unique():
        by_contender = {
            tuple(row[column] for column in CONTENDER): row
            for row in statistics[statistics["task"] == task].to_dict("records")
        }
        cells = [Cell(name_of("task", task))]
        for contender in columns[CONTENDER].itertuples(index=False, name=None):
            column_metric = OF_FULL.get(metric, metric) if contender[0] == "full" else metric
            cells.append(metric_cell(by_contender.get(contender, {}), column_metric))
        lines.append(cells)
    return Grid(headings, {"": lines})


def share_cell(share: float) -> Cell:
    """The cell of a share that was asked for; a dash where it was not."""
    return Cell(f"{100 * share:.4g}", share) if np.isfinite(share) else Cell("-", -np.inf)


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


def middle(rows: pd.DataFrame) -> Budget | None:
    """The budget nearest a half; None for full attention alone."""
    return min(budgets_of(rows), key=lambda budget: abs(budget.share - 0.5), default=None)


def of_generated(rows: pd.DataFrame) -> dict[str, Grid]:
    """The tables of what contenders generate, by title: free text, by turn, by the place in long answers."""
    grids = {WRITTEN_TITLE: written_grid(rows), TURNS_TITLE: turns_grid(rows), THIRDS_TITLE: thirds_grid(rows)}
    return {title: grid for title, grid in grids.items() if grid is not None}


def _rows(results: Mapping[str, Any] | pd.DataFrame) -> pd.DataFrame:
    return results if isinstance(results, pd.DataFrame) else frame(results)


def terminal_table(
    grid: Grid, title: str, caption: str | None = None, leading: int = 1, spreads: bool = True
) -> TextTable:
    """A grid as a terminal table, without the ends of intervals; its first `leading` columns name the rows.

    Without `spreads` it has no intervals at all, as wide tables, which pages show with them.
    """
    sections = {
        section: [[str(cell) if spreads else cell.text for cell in cells] for cells in lines]
        for section, lines in grid.sections.items()
    }
    return TextTable(grid.headings, sections, title, caption, leading)
