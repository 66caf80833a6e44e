"""Figures from what runs have saved: gates, their distribution, and the course of training.

Every function returns a `matplotlib.figure.Figure` of its own: no display is needed, and the style holds inside the
call only.
"""

import re
from collections.abc import Sequence
from io import StringIO
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.collections import QuadMesh
from matplotlib.colors import Colormap, ListedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from duo_id.common.documents import LARGEST_ROWS, one_line, read_text, shown
from duo_id.common.errors import UserError
from duo_id.common.figures import (
    COLORS,
    DASHES,
    GATES,
    MARKERS,
    UNGATED,
    draw_cells,
    hatch_ungated,
    number_heads,
    set_title,
    style,
)
from duo_id.common.files import atomic_path
from duo_id.patterns.pattern import HeadMask, HeadPattern

ANSWER_LOSS = re.compile(r"val/answer_loss_\d+(\.\d+)?", re.ASCII)
TWO = ListedColormap([GATES(0.0), GATES(1.0)])  # of a mask: streaming, retrieval


@style()
def plot_gates(pattern: HeadPattern, title: str | None = None, mask: HeadMask | None = None) -> Figure:
    """Heatmap of the scores, layers x KV heads, and beside it the mask if one is given.

    Layers run down from 0 at the top; where there are more than twice as many layers as KV heads they run to the
    right instead. Layers without gates are hatched.
    """
    layers, kv_heads = pattern.scores.shape
    flat = layers > 2 * kv_heads
    rows, columns = (kv_heads, layers) if flat else (layers, kv_heads)
    panels = 1 if mask is None else 2
    across = 1 if flat else panels
    width = 5.0 if flat or panels == 2 else 3.8
    cell = (width - 0.6 * across) / across / columns
    panel_height = min(max(rows * cell, 0.6, 0.15 * min(rows, 8)), 8.0)  # inches: room for the labels of 8 rows
    figure = Figure(figsize=(width, panel_height * panels / across + 0.45 * panels + 0.8 + 0.25 * bool(title)))
    grid = figure.subplots(panels // across, across, squeeze=False, sharex=True, sharey=True)
    axes: list[Axes] = list(grid.flat)

    label, low, high = _scale(pattern)
    image = _heads(axes[0], pattern.scores.numpy(), pattern.gated_layers, flat, GATES, Normalize(low, high))
    axes[0].set_title(f"{label.split()[0]}s", loc="left")
    bar = figure.colorbar(image, ax=axes, location="bottom", label=label, aspect=40, fraction=0.08, shrink=0.7)
    bar.outline.set_visible(False)

    ungated = len(pattern.gated_layers) < layers
    if mask is not None:
        mask.check_fits(layers, kv_heads, "the pattern")
        _heads(axes[1], mask.retrieval.numpy().astype(float), mask.gated_layers, flat, TWO, Normalize(0, 1))
        axes[1].set_title(f"{100 * mask.sparsity:.3g}% of the heads stream", loc="left")
        figure.legend(handles=_keys(ungated), loc="outside lower center", ncols=3)
    elif ungated:
        figure.legend(handles=[Patch(**UNGATED, label="no gates")], loc="outside lower center")
    set_title(figure, title)
    return figure


@style()
def plot_histogram(
    pattern: HeadPattern, title: str | None = None, sparsities: Sequence[float] = (0.25, 0.5, 0.75)
) -> Figure:
    """How the scores are distributed, and below which score heads stream at each of `sparsities`."""
    scores = pattern.scores[list(pattern.gated_layers)].flatten().numpy()
    figure = Figure(figsize=(4.2, 2.8))
    axes = figure.subplots()
    axes.hist(scores, bins=40, color="#BBBBBB", edgecolor="white", linewidth=0.4)
    for sparsity, color, dash in zip(sparsities, cycle(COLORS), cycle(DASHES), strict=False):
        kept = scores[pattern.binarize(sparsity=sparsity).retrieval[list(pattern.gated_layers)].flatten().numpy()]
        if len(kept):
            label = f"{100 * sparsity:.4g}% stream: below {kept.min():.3g}"
            axes.axvline(kept.min(), color=color, linestyle=dash, linewidth=1.8, label=label)
    axes.set(xlabel=_scale(pattern)[0], ylabel=f"KV heads (of {len(scores)})")
    axes.grid(axis="y")
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    figure.legend(loc="outside lower center")
    set_title(figure, title)
    return figure


@style()
def plot_thresholds(
    pattern: HeadPattern, thresholds: Sequence[float] = (0.05, 0.25, 0.5, 0.75, 0.95), title: str | None = None
) -> Figure:
    """Which heads stream at each of `thresholds`, one mask a panel; `pattern.binarize(threshold=...)` makes them.

    Raises:
        UserError: there is no threshold to show.
    """
    if not len(thresholds):
        raise UserError("thresholds=() shows nothing: give at least one score, such as thresholds=(0.5,)")
    layers, kv_heads = pattern.scores.shape
    flat = layers > 2 * kv_heads
    across = 1 if flat else min(3, len(thresholds))
    down = -(-len(thresholds) // across)
    width, height = (4.8, min(max(0.15 * kv_heads, 0.45), 1.6)) if flat else (1.7, 1.7 * min(layers / kv_heads, 2))
    figure = Figure(figsize=(max(3.4, width * across), (height + 0.3) * down + 0.75 + 0.25 * bool(title)))
    grid = figure.subplots(down, across, squeeze=False, sharex=True, sharey=True)
    for axes, threshold in zip(grid.flat, thresholds, strict=False):
        mask = pattern.binarize(threshold=threshold)
        _heads(axes, mask.retrieval.numpy().astype(float), mask.gated_layers, flat, TWO, Normalize(0, 1))
        streaming = round(mask.sparsity * pattern.gated_heads)
        title_of = (f"below {threshold:g}:", f"{streaming} of {pattern.gated_heads} stream")
        axes.set_title((" " if flat else "\n").join(title_of), loc="left", fontsize=8)
    for unused in list(grid.flat)[len(thresholds) :]:
        unused.set_visible(False)
    for axes in grid.flat[len(thresholds) - across : len(thresholds)]:  # the last of each column
        axes.tick_params(labelbottom=True)
        axes.set_xlabel("layer" if flat else "KV head")
    figure.legend(handles=_keys(len(pattern.gated_layers) < layers), loc="outside lower center", ncols=3)
    set_title(figure, title)
    return figure


@style()
def plot_history(history: pd.DataFrame, sparsity: float = 0.5, title: str | None = None) -> Figure:
    """The course of every gate over training, coloured by what the last gates make of its head.

    Args:
        history: as `duo_id.train.history.read_history` gives it.
        sparsity: fraction of heads that stream; the order among equal gates is that of `HeadPattern`.
        title: above the figure.
    """
    last = history.iloc[-1].to_numpy().argsort(kind="stable")
    count = round(sparsity * len(last))
    figure = Figure(figsize=(4.8, 3.2))
    axes = figure.subplots()
    faint: dict[str, Any] = {"alpha": max(0.08, min(0.5, 25 / len(last))), "linewidth": 0.8}
    for name, heads, color, dash in (
        ("retrieval", last[count:], COLORS[0], "-"),
        ("streaming", last[:count], COLORS[1], "--"),
    ):
        if len(heads):
            chosen = history.iloc[:, heads]
            axes.plot(history.index, chosen, color=color, **faint)
            label = f"{len(heads)} {name} heads, median"
            axes.plot(history.index, chosen.median(axis=1), color=color, linestyle=dash, linewidth=2.2, label=label)
    axes.set(xlabel="step", ylabel="score (1 = retrieval)", ylim=(-0.03, 1.03))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(axis="y")
    figure.legend(loc="outside lower center", ncols=2)
    set_title(figure, title)
    return figure


@style()
def plot_training(metrics: pd.DataFrame | str | Path, title: str | None = None) -> Figure:
    """Loss parts, mean gate and validation answer loss over training steps; a panel without data is left out.

    Args:
        metrics: a frame with a `step` column as `read_metrics` returns it, a metrics CSV or a run folder.
        title: above the figure.

    Raises:
        UserError: if none of the expected columns holds a number.
    """
    if not isinstance(metrics, pd.DataFrame):
        path = Path(metrics)
        metrics = read_metrics(path) if path.is_dir() else _merge([_read_csv(path)])
    steps = metrics.set_index("step").dropna(axis="columns", how="all")
    answers = sorted((_percent(name), name) for name in steps if ANSWER_LOSS.fullmatch(name))
    losses = {"train/distill": "distillation", "train/penalty": "penalty", "val/distill": "distillation, validation"}
    wanted = {
        "loss": losses,
        "mean gate α": {"train/mean_gate": ""},
        "answer loss\n(nats per token)": {
            name: f"{percent:.4g}% stream" if percent else "full attention" for percent, name in answers
        },
    }
    panels = {label: {name: key for name, key in curves.items() if name in steps} for label, curves in wanted.items()}
    panels = {label: curves for label, curves in panels.items() if curves}
    if not panels:
        raise UserError("these metrics hold none of train/distill, train/penalty, train/mean_gate, val/answer_loss_*")
    figure = Figure(figsize=(4.8, 0.5 + 1.75 * len(panels)))
    axes: list[Axes] = list(figure.subplots(len(panels), sharex=True, squeeze=False).flat)
    for panel, (label, curves) in zip(axes, panels.items(), strict=True):
        for (name, key), color, marker in zip(curves.items(), cycle(COLORS), cycle(MARKERS), strict=False):
            _curve(panel, steps[name].dropna(), key, color, marker if name.startswith("val/") else "")
        panel.set_ylabel(label)
        panel.grid(axis="y")
        if any(curves.values()):
            panel.legend()
        if curves.keys() <= losses.keys() and any((steps[name] > 0).any() for name in curves):
            panel.set_yscale("log", nonpositive="mask")  # while all gates are 1 there is no distillation loss
        if "train/mean_gate" in curves:
            panel.set_ylim(0, 1.02)
    axes[-1].set_xlabel("step")
    axes[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.align_ylabels(axes)
    set_title(figure, title)
    return figure


def read_metrics(run_dir: str | Path) -> pd.DataFrame:
    """The metrics that a run logged, one row a step, ascending; NaN where a metric was not logged at a step.

    A resumed run writes a further `metrics/version_N/metrics.csv`; where two versions hold a value for the same step
    the latest wins.

    Raises:
        UserError: if the run has logged nothing yet.
    """
    files = Path(run_dir).glob("metrics/version_*/metrics.csv")
    named = [(path.parent.name.removeprefix("version_"), path) for path in files if path.stat().st_size > 0]
    numbered = {int(number): path for number, path in named if number.isdecimal()}
    if not numbered:
        raise UserError(f"{run_dir} has no metrics yet (metrics/version_*/metrics.csv)")
    return _merge([_read_csv(numbered[version]) for version in sorted(numbered)])


def save_figure(figure: Figure, path: str | Path) -> None:
    """Write `figure` to `path`, whole or not at all; the suffix chooses the format (png, pdf, svg)."""
    kind = Path(path).suffix.removeprefix(".")
    if kind not in figure.canvas.get_supported_filetypes():
        raise UserError(f"{path}: a figure needs a suffix that names its format, such as .png, .pdf or .svg")
    with atomic_path(path) as beside:
        figure.savefig(beside)


def _scale(pattern: HeadPattern) -> tuple[str, float, float]:
    """What the scores are, with the ends of their colour scale: gates, or scores of another kind."""
    if pattern.holds_gates:
        return "gate α (1 = retrieval)", 0.0, 1.0
    low, high = (value.item() for value in pattern.scores[list(pattern.gated_layers)].aminmax())
    return "score (higher = retrieval)", low, high


def _heads(
    axes: Axes, values: np.ndarray, gated: tuple[int, ...], flat: bool, colors: Colormap, limits: Normalize
) -> QuadMesh:
    """Draw one cell a head, values (layers, KV heads); `flat` lets layers run to the right."""
    mesh = draw_cells(axes, values.T if flat else values, limits, colors=colors)
    hatch_ungated(axes, values.shape[0], values.shape[1], gated, flat)
    number_heads(axes, flat)
    return mesh


def _keys(ungated: bool) -> list[Patch]:
    """The legend of a mask."""
    two = zip(("retrieval", "streaming"), (TWO(1.0), TWO(0.0)), strict=True)
    keys = [Patch(facecolor=color, edgecolor="#555555", linewidth=0.5, label=name) for name, color in two]
    return [*keys, Patch(**UNGATED, label="no gates")] if ungated else keys


def _curve(axes: Axes, values: pd.Series, label: str, color: str, marker: str) -> None:
    """Draw one metric; of a long noisy one the running median, with the values themselves faint behind it."""
    window = len(values) // 40
    if window >= 5:
        axes.plot(values.index, values, color=color, alpha=0.25, linewidth=0.6)
        values = values.rolling(window, center=True, min_periods=1).median()
    axes.plot(values.index, values, color=color, marker=marker, markersize=3.5, label=label)


def _read_csv(path: Path) -> pd.DataFrame:
    try:
        table = pd.read_csv(StringIO(read_text(path, LARGEST_ROWS)))
    except UserError:
        raise
    except Exception as error:  # pandas ends in errors of many kinds
        raise UserError(f"{path} is not a metrics CSV: {one_line(error)}") from None
    if "step" not in table:
        raise UserError(f"{path} is not a metrics CSV: it has no column named step")
    for name in table.select_dtypes(exclude="number"):
        raise UserError(f"{path} is not a metrics CSV: {shown(name)} holds something else than numbers")
    return table


def _merge(versions: list[pd.DataFrame]) -> pd.DataFrame:
    return pd.concat(versions).groupby("step").last().copy().reset_index()  # a copy is one block


def _percent(name: str) -> float:
    return float(name.rsplit("_", 1)[1])
