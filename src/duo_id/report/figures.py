"""Figures of saved results: quality by KV budget, by task, and by depth and position in the context.

All take rows as returned by `duo_id.report.summary.frame`.
"""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from duo_id.common.figures import COLORS, DASHES, GREY, MARKERS, draw_cells, label_values, name_points, plain, style
from duo_id.patterns.agreement import plot_agreement, plot_patterns
from duo_id.report.budgets import Budget, budgets_of
from duo_id.report.leaderboard import average_over_seeds, seconds_of
from duo_id.report.rows import KINDS, OF_PATTERNS
from duo_id.report.summary import CONTENDER, REPORTED, contenders, frame, name_of
from duo_id.report.tables import headline

FULL: dict[str, Any] = {"color": "#555555", "linestyle": "--", "linewidth": 1.0}
MAX_DEPTHS = 12  # rows of a heatmap, points of a curve; more are binned into tenths
LineStyle = tuple[str, str, dict[str, Any]]  # kind, heads, and arguments for matplotlib


def figures(results: Mapping[str, Any]) -> dict[str, Figure]:
    """All figures that the results have data for, by file name.

    Args:
        results: as in results.json.
    """
    rows = frame(results)
    by_name: dict[str, Figure] = {}
    budgets = budgets_of(rows)
    if len(budgets) > 1:
        for metric in ("score", "accuracy", "rise", "kl"):
            if metric != "score" or (rows["score"] > 0).any():
                by_name[f"budget-{metric}"] = plot_budget(rows, metric)
    if budgets and rows["task"].nunique() > 1:
        by_name["tasks"] = plot_tasks(rows)
    seconds = seconds_of(results["patterns"])
    if len(seconds) > 1:
        by_name["cost"] = plot_cost(rows, seconds)
    for task in _tasks_with_depths(rows, generated=True):
        scored = (rows.loc[(rows["task"] == task) & (rows["kind"] == "full"), "score"] > 0).any()
        by_name[f"depths-{_slug(task)}"] = plot_depths(rows, task, "score" if scored else "accuracy")
    for task in _tasks_with_depths(rows, generated=False):
        by_name[f"position-{_slug(task)}"] = plot_position(rows, task)
    patterns = average_over_seeds(results["patterns"])
    if patterns:
        by_name["gates"] = plot_patterns(patterns)
    if len(patterns) > 1:
        by_name["agreement"] = plot_agreement(
            patterns, [budget.sparsity for budget in budgets if budget.sparsity is not None]
        )
    return by_name


@style()
def plot_budget(rows: pd.DataFrame, metric: str) -> Figure:
    """One metric over the kept fraction of the KV cache, one line with a 95% band per contender.

    Args:
        rows: of at least one contender besides full attention, which is the dashed line.
        metric: one of `REPORTED`.
    """
    statistics, form = contenders(rows), REPORTED[metric]
    figure = Figure(figsize=(4.8, 3.8))
    axes = figure.subplots()
    shown = []
    for kind, heads, look in line_styles(rows):
        points = _select(statistics, kind, heads).dropna(subset=[metric, "kept"]).sort_values("kept")
        if points.empty:
            continue
        kept_percent = 100 * points["kept"].to_numpy()
        value, low, high = (form.scaled(points[metric + end].to_numpy()) for end in ("", "_low", "_high"))
        if len(points) > 2:
            axes.fill_between(kept_percent, low, high, color=look["color"], alpha=0.1, linewidth=0)
        else:  # a line through two points suggests a course that nobody measured
            look |= {"linestyle": ""}
            axes.vlines(kept_percent, low, high, color=look["color"])
        axes.plot(kept_percent, value, label=_label(kind, heads), markersize=4, **look)
        shown.append(value)
    full = _select(statistics, "full", "full")[metric]
    if full.notna().any():
        axes.axhline(form.scaled(full.iloc[0]), label="full attention", **FULL)
    axes.set(xlabel="KV cache kept (% of full attention's bytes)", ylabel=form.label)
    if not form.percent and shown:
        label_values(axes, "y", np.concatenate(shown), form.label)
    axes.grid(axis="y")
    if form.percent and axes.get_ylim()[0] < axes.get_ylim()[1] / 3:  # else the lines would share the top of the axes
        axes.set_ylim(bottom=0)
    _legend(figure, axes)
    return figure


@style()
def plot_cost(rows: pd.DataFrame, seconds: Mapping[str, float]) -> Figure:
    """The rise in answer loss over the time that identifying the heads took, one panel per budget.

    Args:
        rows: of the patterns in `seconds`; others are left out.
        seconds: by name, each above 0.
    """
    statistics = contenders(rows[rows["heads"].isin([*seconds, "full"])])
    timed, panels = statistics[statistics["kind"].isin(OF_PATTERNS)], budgets_of(statistics)
    figure = Figure(figsize=(max(4.2, 0.9 + 2.6 * len(panels)), 3.4))
    grid = figure.subplots(1, len(panels), squeeze=False, sharex=True, sharey=True)
    for axes, budget in zip(grid.flat, panels, strict=True):
        for point in timed[timed["budget"] == budget].to_dict("records"):
            x, name = seconds[point["heads"]], _label(point["kind"], point["heads"])
            axes.vlines(x, point["rise_low"], point["rise_high"], color=COLORS[0], linewidth=0.9, alpha=0.5)
            axes.plot(x, point["rise"], "o", color=COLORS[0], markersize=4, label=name)
        axes.axhline(0, **FULL)
        axes.set_title(str(budget), loc="left")
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter("{x:g}")
        axes.margins(x=0.12)
        axes.grid(axis="y")
    label_values(grid[0, 0], "y", timed["rise"].to_numpy(), REPORTED["rise"].label)
    figure.supxlabel("time to identify the heads (s)", fontsize=9)
    for axes in grid.flat:
        name_points(figure, axes)
    return figure


@style()
def plot_tasks(rows: pd.DataFrame, metric: str | None = None) -> Figure:
    """A row per task, in it a point and its 95% interval per contender; one panel per budget; dashed: full attention.

    Args:
        rows: of at least one contender besides full attention.
        metric: relative to full attention; None: see `headline`. Tasks without values are left out.
    """
    metric = metric or headline(rows)
    form, statistics = REPORTED[metric], contenders(rows, ["task"])
    statistics = statistics[statistics[metric].notna() & (statistics["kind"] != "full")]
    tasks = [task for task in rows["task"].unique() if task in set(statistics["task"])]
    styles = line_styles(rows)
    panels = budgets_of(statistics) or budgets_of(rows)
    spacing = 0.8 / len(styles)
    height = 1.3 + max(1, len(tasks)) * max(0.3, 0.09 * len(styles)) + 0.06 * len(styles)
    figure = Figure(figsize=(max(4.8, 1.6 + 2.1 * len(panels)), height))
    grid = figure.subplots(1, len(panels), squeeze=False, sharex=True, sharey=True)
    for axes, budget in zip(grid.flat, panels, strict=True):
        for series, (kind, heads, look) in enumerate(styles):
            chosen = _select(statistics, kind, heads)
            values = chosen[chosen["budget"] == budget].set_index("task").reindex(tasks)
            value, low, high = (form.scaled(values[metric + end].to_numpy()) for end in ("", "_low", "_high"))
            y = np.arange(len(tasks)) - 0.4 + (series + 0.5) * spacing
            axes.hlines(y, low, high, color=look["color"], linewidth=0.9)
            axes.plot(value, y, label=_label(kind, heads), markersize=3.5, **look | {"linestyle": ""})
        for line in range(1, len(tasks)):
            axes.axhline(line - 0.5, color="#E4E4E4", linewidth=0.6, zorder=0)
        axes.axvline(form.scaled(1.0) if form.percent else 0.0, **FULL)
        axes.set_title(str(budget), loc="left")
        axes.grid(axis="x")
        axes.xaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10]))
    grid[0, 0].set_yticks(range(len(tasks)), [plain(task) for task in tasks])
    grid[0, 0].set_ylim(len(tasks) - 0.4, -0.6)
    if not form.percent:
        label_values(grid[0, 0], "x", statistics[metric].to_numpy(), form.label)
    figure.supxlabel(grid[0, 0].get_xlabel() or form.label, fontsize=9)
    grid[0, 0].set_xlabel("")
    _legend(figure, grid[0, 0])
    return figure


@style()
def plot_depths(rows: pd.DataFrame, task: str, metric: str = "score") -> Figure:
    """Heatmaps over context length and depth of the answer on one scale: a row per contender, a column per budget.

    Contenders without values of the metric, such as scores of answers that were not generated, are left out.

    Args:
        rows: including some of the task.
        task: one whose questions have depths.
        metric: one of `REPORTED` that is a percentage of at most 100.
    """
    rows, form = _with_depths(rows, task), REPORTED[metric]
    statistics = contenders(rows, ["length", "depth"])
    measured = statistics.loc[statistics[metric].notna(), CONTENDER].drop_duplicates()
    rows, statistics = (table.merge(measured) for table in (rows, statistics))
    kept_by_contender = contenders(rows).set_index(CONTENDER)["kept"]
    lengths, depths = sorted(statistics["length"].unique()), sorted(statistics["depth"].unique())
    names = [("full", "full"), *((kind, heads) for kind, heads, _ in line_styles(rows))]
    panels = budgets_of(rows) or [Budget(0.0)]
    width, height = max(1.0, 0.34 * len(lengths)), max(0.6, 0.17 * len(depths))
    size = max(3.6, 1.2 + (width + 0.15) * len(panels)), 1.6 + (height + 0.3) * len(names)
    figure = Figure(figsize=size)
    grid = figure.subplots(len(names), len(panels), squeeze=False, sharex=True, sharey=True)
    for row, (kind, heads) in enumerate(names):
        for column, budget in enumerate([Budget(0.0)] if kind == "full" else panels):
            of_panel = _select(statistics, kind, heads)
            of_panel = of_panel[of_panel["budget"] == budget]
            if of_panel.empty:
                continue
            cells = of_panel.pivot(index="depth", columns="length", values=metric).reindex(
                index=depths, columns=lengths
            )
            axes = grid[row, column]
            mesh = draw_cells(
                axes, form.scaled(cells.to_numpy()), Normalize(0, 100), "{:.0f}" if width / len(lengths) > 0.2 else ""
            )
            title = "" if kind == "full" else f"{100 * kept_by_contender[kind, heads, budget]:.0f}% KV"
            axes.set_title(title, loc="left", fontsize=8)
        grid[row, 0].set_title(
            f"{_label(kind, heads)}\n{grid[row, 0].get_title(loc='left')}".strip(), loc="left", fontsize=8
        )
    for axes_column in grid.T:
        used = [axes for axes in axes_column if axes.collections]
        for axes in set(axes_column) - set(used):
            axes.axis("off")
        for axes in used:
            axes.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths], rotation=90)
            axes.set_yticks(range(len(depths)), [f"{100 * depth:.0f}" for depth in depths])
            axes.tick_params(length=2, labelbottom=axes is used[-1])
    bar = figure.colorbar(mesh, ax=grid, location="top", label=f"{plain(task)}: {form.label}", aspect=40, shrink=0.8)
    bar.outline.set_visible(False)
    figure.supylabel("depth of the answer (% of the context)", fontsize=9)
    figure.supxlabel("context (tokens)", fontsize=9)
    return figure


@style()
def plot_position(rows: pd.DataFrame, task: str) -> Figure:
    """Loss over the position of the answer, all lengths together: one panel per budget, one line per contender.

    There are no bands: they would show how hard the text is, the same for all, and hide how close the lines are.

    Args:
        rows: including some of the task.
        task: one whose answers have depths.
    """
    rows = _with_depths(rows, task)
    statistics, panels = contenders(rows, ["depth"]), budgets_of(rows) or [Budget(0.0)]
    figure = Figure(figsize=(max(4.2, 0.9 + 1.9 * len(panels)), 3.4))
    grid = figure.subplots(1, len(panels), squeeze=False, sharex=True, sharey=True)
    for axes, budget in zip(grid.flat, panels, strict=True):
        for kind, heads, look in [("full", "full", FULL), *line_styles(rows)]:
            curve = _select(statistics, kind, heads)
            chosen = curve[(curve["budget"] == budget) | (curve["kind"] == "full")]
            chosen = chosen.sort_values("depth")
            joined = {} if len(chosen) > 2 or kind == "full" else {"linestyle": ""}
            axes.plot(100 * chosen["depth"], chosen["loss"], label=_label(kind, heads), markersize=4, **look | joined)
        axes.set_title(str(budget) if budget.share else "", loc="left")
        axes.grid(axis="y")
    grid[0, 0].set_ylabel(f"{plain(task)}: {REPORTED['loss'].label}")
    figure.supxlabel("position of the answer in the context (%)", fontsize=9)
    _legend(figure, grid[0, 0])
    return figure


def line_styles(rows: pd.DataFrame) -> list[LineStyle]:
    """Colour, marker and dashes of all contenders except full attention, patterns first; the seventh on are grey."""
    names = rows.loc[rows["kind"] != "full", ["kind", "heads"]].drop_duplicates().itertuples(index=False)
    styles: list[LineStyle] = []
    for index, (kind, heads) in enumerate(sorted(names, key=lambda name: KINDS.index(name[0]))):
        lap = index // len(COLORS)
        look = {
            "color": GREY if lap else COLORS[index],
            "marker": MARKERS[(index + max(lap - 1, 0)) % len(MARKERS)],
            "linestyle": DASHES[lap % len(DASHES)],
        }
        styles.append((kind, heads, look))
    return styles


def _legend(figure: Figure, axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    columns = min(len(labels), max(1, int(figure.get_figwidth() / (0.7 + 0.08 * max(map(len, labels), default=0)))))
    figure.legend(handles, labels, loc="outside upper center", ncols=columns)


def _label(kind: str, heads: str) -> str:
    """A legend's name for a contender; a leading underscore would hide the entry."""
    return plain(f" {heads}" if heads.startswith("_") else name_of(kind, heads))


def _select(statistics: pd.DataFrame, kind: str, heads: str) -> pd.DataFrame:
    return statistics[(statistics["kind"] == kind) & (statistics["heads"] == heads)]


def _tasks_with_depths(rows: pd.DataFrame, generated: bool) -> list[str]:
    """Tasks with answers at several depths as drawn: either those with generated answers, or the others."""
    tasks = rows.loc[rows["depth"].notna(), "task"].unique()
    of_kind = [task for task in tasks if rows.loc[rows["task"] == task, "score"].notna().any() == generated]
    return [task for task in of_kind if _with_depths(rows, task)["depth"].nunique() > 1]


def _with_depths(rows: pd.DataFrame, task: str) -> pd.DataFrame:
    """The rows of a task that have a depth, binned into tenths where there are many depths."""
    rows = rows[(rows["task"] == task) & rows["depth"].notna()]
    depths = rows["depth"].round(3)
    if depths.nunique() > MAX_DEPTHS:
        depths = (np.floor(depths * 10).clip(0, 9) + 0.5) / 10
    return rows.assign(depth=depths)


def _slug(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9_]+", "-", name).strip("-")
