"""Figures of a training run: its curves and its gates over time."""

import re
from io import StringIO
from itertools import cycle
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from duo_id.common.documents import LARGEST_ROWS, excerpt, read_text
from duo_id.common.errors import UserError, one_line
from duo_id.common.figures import (
    COLORS,
    MARKERS,
    set_title,
    style,
)

ANSWER_LOSS = re.compile(r"val/answer_loss_\d+(\.\d+)?", re.ASCII)


@style()
def plot_history(history: pd.DataFrame, sparsity: float = 0.5, title: str | None = None) -> Figure:
    """Every gate over training, coloured by the kind of its head in the final mask.

    Args:
        history: from `duo_id.train.history.read_history`.
        sparsity: fraction of heads that stream; ties are broken as in `HeadPattern`.
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
    """Loss parts, mean gate and validation answer loss over training steps; panels without data are left out.

    Args:
        metrics: a frame with a `step` column as `read_metrics` returns it, a metrics CSV or a run folder.
        title: above the figure.

    Raises:
        UserError: none of the expected columns holds a number.
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
            panel.set_yscale("log", nonpositive="mask")  # while all gates are 1 the distillation loss is 0
        if "train/mean_gate" in curves:
            panel.set_ylim(0, 1.02)
    axes[-1].set_xlabel("step")
    axes[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.align_ylabels(axes)
    set_title(figure, title)
    return figure


def read_metrics(run_dir: str | Path) -> pd.DataFrame:
    """The metrics that a run logged, one row per step, ascending; NaN where a metric was not logged at a step.

    A resumed run writes another `metrics/version_N/metrics.csv`; if two versions have a value for a step, the later
    one wins.

    Raises:
        UserError: the run has not logged anything yet.
    """
    files = Path(run_dir).glob("metrics/version_*/metrics.csv")
    named = [(path.parent.name.removeprefix("version_"), path) for path in files if path.stat().st_size > 0]
    numbered = {int(number): path for number, path in named if number.isdecimal()}
    if not numbered:
        raise UserError(f"{run_dir} has no metrics yet (metrics/version_*/metrics.csv)")
    return _merge([_read_csv(numbered[version]) for version in sorted(numbered)])


def _curve(axes: Axes, values: pd.Series, label: str, color: str, marker: str) -> None:
    """Plot one metric; for a long series, the running median over the faint values."""
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
    except Exception as error:  # pandas raises errors of many kinds
        raise UserError(f"{path} is not a metrics CSV: {one_line(error)}") from None
    if "step" not in table:
        raise UserError(f"{path} is not a metrics CSV: it has no column named step")
    for name in table.select_dtypes(exclude="number"):
        raise UserError(f"{path} is not a metrics CSV: {excerpt(name)} holds values other than numbers")
    return table


def _merge(versions: list[pd.DataFrame]) -> pd.DataFrame:
    return pd.concat(versions).groupby("step").last().copy().reset_index()  # a copy is one block


def _percent(name: str) -> float:
    return float(name.rsplit("_", 1)[1])
