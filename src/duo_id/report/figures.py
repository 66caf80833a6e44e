"""Figures of saved results: quality over the KV budget, over tasks, over depth and position in the context.

All take rows as `duo_id.report.summary.frame` gives them.
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

from duo_id.common.figures import COLORS, DASHES, MARKERS, draw_cells, plain, style
from duo_id.patterns.agreement import plot_agreement, plot_patterns
from duo_id.report.leaderboard import averaged, seconds_of
from duo_id.report.summary import CONTENDER, KINDS, REPORTED, contenders, frame
from duo_id.report.tables import headline

FULL: dict[str, Any] = {"color": "#555555", "linestyle": "--", "linewidth": 1.0}
MOST_DEPTHS = 12  # rows of a heatmap, points of a curve; more are put into tenths
Look = tuple[str, str, dict[str, Any]]  # kind, heads, how they are drawn


def figures(results: Mapping[str, Any]) -> dict[str, Figure]:
    """All figures for which the results hold enough, by the names that their files get.

    Args:
        results: as in results.json.
    """
    rows = frame(results)
    found: dict[str, Figure] = {}
    if len(sparsities_of(rows)) > 1:
        for metric in ("score", "accuracy", "rise"):
            if metric != "score" or rows["score"].notna().any():
                found[f"budget-{metric}"] = plot_budget(rows, metric)
    if sparsities_of(rows) and rows["task"].nunique() > 1:
        found["tasks"] = plot_tasks(rows)
    seconds = seconds_of(results["patterns"])
    if len(seconds) > 1:
        found["cost"] = plot_cost(rows, seconds)
    for task in _placed(rows, generated=True):
        found[f"depths-{_slug(task)}"] = plot_depths(rows, task)
    for task in _placed(rows, generated=False):
        found[f"position-{_slug(task)}"] = plot_position(rows, task)
    patterns = averaged(results["patterns"])
    if patterns:
        found["gates"] = plot_patterns(patterns)
    if len(patterns) > 1:
        found["agreement"] = plot_agreement(patterns, sparsities_of(rows))
    return found


def sparsities_of(rows: pd.DataFrame) -> list[float]:
    """The sparsities of all contenders but full attention, ascending."""
    return sorted(rows.loc[rows["kind"] != "full", "sparsity"].unique())


@style()
def plot_budget(rows: pd.DataFrame, metric: str) -> Figure:
    """One metric over the kept fraction of the KV cache, a line with a 95% band for each name.

    Args:
        rows: of at least one contender beside full attention, which is the dashed line.
        metric: one of `REPORTED`.
    """
    found, form = contenders(rows), REPORTED[metric]
    figure = Figure(figsize=(4.8, 3.8))
    axes = figure.subplots()
    for kind, heads, look in line_styles(rows):
        points = _of(found, kind, heads).dropna(subset=[metric, "kept"]).sort_values("kept")
        if points.empty:
            continue
        places = 100 * points["kept"].to_numpy()
        value, low, high = (form.scaled(points[metric + end].to_numpy()) for end in ("", "_low", "_high"))
        axes.plot(places, value, label=_label(heads), markersize=4, **look)
        if len(points) > 1:
            axes.fill_between(places, low, high, color=look["color"], alpha=0.1, linewidth=0)
        else:
            axes.vlines(places, low, high, color=look["color"])
    full = _of(found, "full", "full")[metric]
    if full.notna().any():
        axes.axhline(form.scaled(full.iloc[0]), label="full attention", **FULL)
    axes.set(xlabel="KV cache kept (% of full attention's bytes)", ylabel=form.label)
    axes.grid(axis="y")
    if form.percent:
        axes.set_ylim(bottom=0)
    _legend(figure, axes)
    return figure


@style()
def plot_cost(rows: pd.DataFrame, seconds: Mapping[str, float]) -> Figure:
    """The rise in answer loss over the time that finding the heads took, one panel a sparsity.

    Args:
        rows: of the patterns that `seconds` names, among others, which are left out.
        seconds: by name, each above 0.
    """
    found, panels = contenders(rows), sparsities_of(rows[rows["heads"].isin(seconds)])
    figure = Figure(figsize=(max(4.2, 0.9 + 1.9 * len(panels)), 3.2))
    grid = figure.subplots(1, len(panels), squeeze=False, sharex=True, sharey=True)
    for axes, sparsity in zip(grid.flat, panels, strict=True):
        for kind, heads, look in line_styles(rows):
            points = _of(found, kind, heads)
            points = points[points["sparsity"] == sparsity]
            if kind != "pattern" or heads not in seconds or points.empty:
                continue
            value, low, high = (points[f"rise{end}"].to_numpy() for end in ("", "_low", "_high"))
            axes.plot(seconds[heads], value, label=_label(heads), markersize=5, **look | {"linestyle": ""})
            axes.vlines(seconds[heads], low, high, color=look["color"], linewidth=0.9)
        axes.axhline(0, **FULL)
        axes.set_title(f"{100 * sparsity:.4g}% stream", loc="left")
        axes.set_xscale("log")
        axes.grid(axis="y")
    grid[0, 0].set_ylabel(REPORTED["rise"].label)
    figure.supxlabel("time to find the heads (s)", fontsize=9)
    _legend(figure, grid[0, 0])
    return figure


@style()
def plot_tasks(rows: pd.DataFrame, metric: str | None = None) -> Figure:
    """Bars for each task and contender, one panel a sparsity; the dashed line is full attention.

    Args:
        rows: of at least one contender beside full attention.
        metric: relative to full attention; None: see `headline`.
    """
    metric = metric or headline(rows)
    form, found = REPORTED[metric], contenders(rows, ["task"])
    known = set(found.loc[found[metric].notna(), "task"])
    tasks = [task for task in rows["task"].unique() if task in known]
    drawn = line_styles(rows)
    panels = sparsities_of(found[found[metric].notna()]) or sparsities_of(rows)
    thick = 0.8 / len(drawn)
    height = 1.3 + max(1, len(tasks)) * max(0.35, 0.12 * len(drawn)) + 0.06 * len(drawn)
    figure = Figure(figsize=(max(4.8, 1.6 + 1.7 * len(panels)), height))
    grid = figure.subplots(1, len(panels), squeeze=False, sharex=True, sharey=True)
    for axes, sparsity in zip(grid.flat, panels, strict=True):
        for place, (kind, heads, look) in enumerate(drawn):
            chosen = _of(found, kind, heads)
            values = chosen[chosen["sparsity"] == sparsity].set_index("task").reindex(tasks)
            value, low, high = (form.scaled(values[metric + end].to_numpy()) for end in ("", "_low", "_high"))
            at = np.arange(len(tasks)) - 0.4 + (place + 0.5) * thick
            hatch = "" if place < len(COLORS) else "////"  # where colours come again
            axes.barh(
                at, value, thick, color=look["color"], alpha=0.75, label=_label(heads), hatch=hatch, edgecolor="white"
            )
            axes.hlines(at, low, high, color="#222222", linewidth=0.7)
        axes.axvline(form.scaled(1.0) if form.percent else 0.0, **FULL)
        axes.set_title(f"{100 * sparsity:.4g}% stream", loc="left")
        axes.grid(axis="x")
        axes.xaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10]))
    grid[0, 0].set_yticks(range(len(tasks)), [plain(task) for task in tasks])
    grid[0, 0].set_ylim(len(tasks) - 0.4, -0.6)
    figure.supxlabel(form.label, fontsize=9)
    _legend(figure, grid[0, 0])
    return figure


@style()
def plot_depths(rows: pd.DataFrame, task: str, metric: str = "score") -> Figure:
    """Heatmaps of context length and depth of the needle on one scale: contenders down, sparsities to the right.

    Who has no value of the metric, as of answers that were not generated, is left out.

    Args:
        rows: some of which belong to the task.
        task: one whose questions lie at known depths.
        metric: one of `REPORTED` that is a percentage of at most 100.
    """
    rows, form = _with_depths(rows, task), REPORTED[metric]
    found = contenders(rows, ["length", "depth"])
    known = found.loc[found[metric].notna(), CONTENDER].drop_duplicates()
    rows, found = (table.merge(known) for table in (rows, found))
    kept = contenders(rows).set_index(["heads", "sparsity"])["kept"]
    lengths, depths = sorted(found["length"].unique()), sorted(found["depth"].unique())
    names = [("full", "full"), *((kind, heads) for kind, heads, _ in line_styles(rows))]
    panels = sparsities_of(rows) or [0.0]
    width, height = max(1.0, 0.34 * len(lengths)), max(0.6, 0.17 * len(depths))
    size = max(3.6, 1.2 + (width + 0.15) * len(panels)), 1.6 + (height + 0.3) * len(names)
    figure = Figure(figsize=size)
    grid = figure.subplots(len(names), len(panels), squeeze=False, sharex=True, sharey=True)
    for line, (kind, heads) in enumerate(names):
        for place, sparsity in enumerate([0.0] if kind == "full" else panels):
            of_panel = _of(found, kind, heads)
            of_panel = of_panel[of_panel["sparsity"] == sparsity]
            if of_panel.empty:
                continue
            cells = of_panel.pivot(index="depth", columns="length", values=metric).reindex(
                index=depths, columns=lengths
            )
            axes = grid[line, place]
            mesh = draw_cells(
                axes, form.scaled(cells.to_numpy()), Normalize(0, 100), "{:.0f}" if width / len(lengths) > 0.2 else ""
            )
            title = "" if kind == "full" else f"{100 * kept[heads, sparsity]:.0f}% KV"
            axes.set_title(title, loc="left", fontsize=8)
        grid[line, 0].set_title(
            f"{_label(heads)}\n{grid[line, 0].get_title(loc='left')}".strip(), loc="left", fontsize=8
        )
    for column in grid.T:
        shown = [axes for axes in column if axes.collections]
        for axes in set(column) - set(shown):
            axes.axis("off")
        for axes in shown:
            axes.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths], rotation=90)
            axes.set_yticks(range(len(depths)), [f"{100 * depth:.0f}" for depth in depths])
            axes.tick_params(length=2, labelbottom=axes is shown[-1])
    bar = figure.colorbar(mesh, ax=grid, location="top", label=f"{plain(task)}: {form.label}", aspect=40, shrink=0.8)
    bar.outline.set_visible(False)
    figure.supylabel("depth of the needle (% of the context)", fontsize=9)
    figure.supxlabel("context (tokens)", fontsize=9)
    return figure


@style()
def plot_position(rows: pd.DataFrame, task: str) -> Figure:
    """Loss over the place in the context, all lengths together: one panel a sparsity, one line a name.

    There are no bands: text that is hard to predict is hard for all, so they would hide how close the lines are.

    Args:
        rows: some of which belong to the task.
        task: one whose answers stand at known places.
    """
    rows = _with_depths(rows, task)
    found, panels = contenders(rows, ["depth"]), sparsities_of(rows) or [0.0]
    figure = Figure(figsize=(max(4.2, 0.9 + 1.9 * len(panels)), 3.4))
    grid = figure.subplots(1, len(panels), squeeze=False, sharex=True, sharey=True)
    for axes, sparsity in zip(grid.flat, panels, strict=True):
        for kind, heads, look in [("full", "full", FULL), *line_styles(rows)]:
            line = _of(found, kind, heads)
            chosen = line[(line["sparsity"] == sparsity) | (line["kind"] == "full")]
            chosen = chosen.sort_values("depth")
            axes.plot(100 * chosen["depth"], chosen["loss"], label=_label(heads), markersize=4, **look)
        axes.set_title(f"{100 * sparsity:.4g}% stream" if sparsity else "", loc="left")
        axes.grid(axis="y")
    grid[0, 0].set_ylabel(f"{plain(task)}: {REPORTED['loss'].label}")
    figure.supxlabel("place in the context (%)", fontsize=9)
    _legend(figure, grid[0, 0])
    return figure


def line_styles(rows: pd.DataFrame) -> list[Look]:
    """Colour, marker and dashes of all contenders but full attention, patterns first."""
    names = rows.loc[rows["kind"] != "full", ["kind", "heads"]].drop_duplicates().itertuples(index=False)
    found: list[Look] = []
    for place, (kind, heads) in enumerate(sorted(names, key=lambda name: KINDS.index(name[0]))):
        again = place // len(COLORS)  # other markers and dashes where colours come again
        look = {
            "color": COLORS[place % len(COLORS)],
            "marker": MARKERS[(place + again) % len(MARKERS)],
            "linestyle": DASHES[again % len(DASHES)],
        }
        found.append((kind, heads, look))
    return found


def _legend(figure: Figure, axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    columns = min(len(labels), max(1, int(figure.get_figwidth() / (0.7 + 0.08 * max(map(len, labels), default=0)))))
    figure.legend(handles, labels, loc="outside upper center", ncols=columns)


def _label(heads: str) -> str:
    """A name in a legend, where a leading underscore would hide it."""
    return "full attention" if heads == "full" else plain(f" {heads}" if heads.startswith("_") else heads)


def _of(found: pd.DataFrame, kind: str, heads: str) -> pd.DataFrame:
    return found[(found["kind"] == kind) & (found["heads"] == heads)]


def _placed(rows: pd.DataFrame, generated: bool) -> list[str]:
    """Tasks with answers at several depths: those that are answered by generating, or those that are not."""
    by_task = rows.dropna(subset=["depth"]).groupby("task", sort=False)
    found = by_task.agg(depths=("depth", "nunique"), scores=("score", "count"))
    return list(found.index[(found["depths"] > 1) & ((found["scores"] > 0) == generated)])


def _with_depths(rows: pd.DataFrame, task: str) -> pd.DataFrame:
    """The rows of a task that have a depth, as the middle of a tenth where there are many."""
    rows = rows[(rows["task"] == task) & rows["depth"].notna()]
    depths = rows["depth"].round(3)
    if depths.nunique() > MOST_DEPTHS:
        depths = (np.floor(depths * 10).clip(0, 9) + 0.5) / 10
    return rows.assign(depth=depths)


def _slug(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9_]+", "-", name).strip("-")
