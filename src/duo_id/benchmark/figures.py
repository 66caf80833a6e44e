"""Figures of a saved benchmark: time and memory by context length, chunk size or share of retrieval heads."""

from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from duo_id.benchmark.tables import FULL, BenchmarkResults, kv_of, memory
from duo_id.common.documents import checked, read_object
from duo_id.common.errors import UserError
from duo_id.common.figures import COLORS, MARKERS, set_title, style

AXES = {
    "context": "context (thousand tokens)",
    "chunk_size": "chunk size (1024 tokens)",
    "retrieval": "retrieval heads (% of KV heads)",
}
TIMES = {"decode": ("time of a decode step (ms)", 1.0), "prefill": ("time of the prefill (s)", 1e-3)}  # and unit of ms
CARDS = (16, 24, 32, 48, 64, 80, 96, 141, 192)  # GiB of memory, about those that are made
FULL_ATTENTION = "full attention"
Points = list[tuple[float, Mapping[str, Any]]]


def plotted_axes(results: Mapping[str, Any]) -> list[str]:
    """The axes that a benchmark varies, or else its task's default axis: keys of `AXES`."""
    rows = results["rows"]
    varied = [axis for axis in AXES if len({_coordinate(row, axis) for row in _rows_on_axis(rows, axis)}) > 1]
    return varied or ["chunk_size" if results["task"] == "prefill" else "context"]


@style()
def plot_benchmark(results: Mapping[str, Any] | str | Path, axis: str) -> Figure:
    """Time and memory of full attention and of masks along one axis, with floors; other axes at their largest value.

    Args:
        results: the contents of results.json, or its path.
        axis: context | chunk_size | retrieval.

    Raises:
        UserError: no row was measured, or the file cannot be read.
    """
    source = ""
    if not isinstance(results, Mapping):
        path, results = results, read_object(results)
        source = f"{path}: "
        checked(BenchmarkResults, results, path)
    if not results["rows"]:
        raise UserError(f"{source}there is nothing to plot: no row was measured")
    rows, fixed = _at_largest(results["rows"], axis)
    lines = _curves(rows, axis)
    coordinates = sorted({x for points in lines.values() for x, _ in points})
    margin = 0.05 * (coordinates[-1] - coordinates[0]) or 1.0
    label, unit = TIMES.get(results["task"], ("", 0.0))
    panels = 2 if label else 1
    figure = Figure(figsize=(3.1 * panels + 0.2, 3.3))
    axes: list[Axes] = list(figure.subplots(1, panels, squeeze=False).flat)
    for (name, points), color, marker in zip(lines.items(), cycle(COLORS), cycle(MARKERS), strict=False):
        look = {"color": color} | _look(len(points), marker, level=axis == "retrieval" and name == FULL_ATTENTION)
        if label:
            _plot_line(axes[0], [(x, _in_unit(row.get("ms"), unit)) for x, row in points], name, look)
            floors = [(x, _in_unit(row.get("floor_ms"), unit)) for x, row in points]
            _plot_line(axes[0], floors, "", {"color": color, "linestyle": "--", "linewidth": 1.0})
        memories = [(x, _in_unit(memory(row), 2**-30)) for x, row in points]
        _plot_line(axes[-1], memories, "" if label else name, look)
        for panel in axes:
            for x, row in points:
                if row["status"] == "OOM":
                    transform = panel.get_xaxis_transform()
                    panel.text(x, 1.01, "OOM", color=color, transform=transform, ha="center", va="bottom")
    for panel, text in zip(axes, [label, "memory (GiB)"][-panels:], strict=True):
        panel.set(xlabel=AXES[axis], ylabel=text)
        panel.set_ylim(bottom=0)
        panel.set_xlim(coordinates[0] - margin, coordinates[-1] + margin)  # even without points, if all is OOM
        if axis == "chunk_size":
            panel.set_xticks(coordinates)
        panel.grid(axis="y")
    if label:
        axes[0].plot([], [], color="#555555", linestyle="--", linewidth=1.0, label="floor")
    figure.legend(loc="outside lower center", ncols=3)
    set_title(figure, "\n".join(filter(None, [f"{results['model']['name']}, {results['device']}", fixed])))
    return figure


def largest_contexts(results: Mapping[str, Any]) -> dict[str, list[float]]:
    """How many tokens fit on each of `CARDS`, by contender: memory grows by as much a token as between the two longest.

    Left out is who has fewer than two measured contexts, or does not grow.
    """
    found = {}
    for name, points in _curves(_at_largest(results["rows"], "context")[0], "context").items():
        measured = [(1e3 * x, size) for x, row in points if (size := memory(row)) is not None]
        if len(measured) > 1 and (per_token := _slope(*measured[-2:])) > 0:
            context, size = measured[-1]
            found[name] = [max(0.0, context + (card * 2**30 - size) / per_token) for card in CARDS]
    return found


@style()
def plot_largest_contexts(results: Mapping[str, Any]) -> Figure:
    """The largest context of a decode step over a card's memory, see `largest_contexts`; what is measured is less."""
    figure = Figure(figsize=(4.8, 3.6))
    axes = figure.subplots()
    for (name, tokens), color, marker in zip(
        largest_contexts(results).items(), cycle(COLORS), cycle(MARKERS), strict=False
    ):
        axes.plot(CARDS, [count / 1e6 for count in tokens], color=color, marker=marker, markersize=3.5, label=name)
    axes.set(xlabel="memory of a card (GiB)", ylabel="largest context (million tokens)")
    axes.set_ylim(bottom=0)
    axes.grid(axis="y")
    figure.legend(loc="outside lower center", ncols=2)
    set_title(figure, f"{results['model']['name']}, from {results['device']}")
    return figure


def _slope(first: tuple[float, int], last: tuple[float, int]) -> float:
    return (last[1] - first[1]) / (last[0] - first[0])


def _coordinate(row: Mapping[str, Any], axis: str) -> float | None:
    """A row's coordinate on an axis, in the units of its label."""
    if axis == "retrieval":
        return 100 * (1 - row["sparsity"])
    return None if row[axis] is None else row[axis] / (1024 if axis == "chunk_size" else 1e3)


def _rows_on_axis(rows: Sequence[Mapping[str, Any]], axis: str) -> list[Mapping[str, Any]]:
    return [row for row in rows if row["attention"] not in FULL] if axis == "retrieval" else list(rows)


def _at_largest(rows: Sequence[Mapping[str, Any]], axis: str) -> tuple[list[Mapping[str, Any]], str]:
    """The rows at the largest value of each axis except the plotted one, and a description of these values."""
    words = []
    for key, text in (("context", "{:,} tokens"), ("chunk_size", "chunks of {:,}")):
        if key != axis and any(row[key] is not None for row in rows):
            largest = max(row[key] for row in rows)
            rows = [row for row in rows if row[key] == largest]
            words.append(text.format(largest))
    return list(rows), ", ".join(words)


def _curves(rows: Sequence[Mapping[str, Any]], axis: str) -> dict[str, Points]:
    """The curves of a figure: full attention (the faster baseline at each point) and the masks, for each `kv`."""
    kvs = list(dict.fromkeys(map(kv_of, rows)))
    if len(kvs) > 1:
        each = {kv: _curves([row for row in rows if kv_of(row) == kv], axis) for kv in kvs}
        return {f"{name}{_suffix(kv)}": points for kv, curves in each.items() for name, points in curves.items()}
    full: dict[float, Mapping[str, Any]] = {}
    masks: dict[str, Points] = {}
    for row in rows:
        x = _coordinate(row, axis)
        assert x is not None
        if row["attention"] not in FULL:
            retrieval = "" if axis == "retrieval" else f", {100 * (1 - row['sparsity']):.4g}% retrieval heads"
            name = f"{row['attention']}{retrieval}"
            masks.setdefault(name, []).append((x, row))
        elif x not in full or _rank(row) < _rank(full[x]):
            full[x] = row
    if axis == "retrieval" and full:  # a horizontal line across the masks
        (row,) = full.values()
        coordinates = sorted({x for points in masks.values() for x, _ in points} | {100.0})
        full = dict.fromkeys(coordinates, row)
    lines = {FULL_ATTENTION: list(full.items())} | masks
    return {name: sorted(points, key=lambda point: point[0]) for name, points in lines.items() if points}


def _suffix(kv: str) -> str:
    return "" if kv == "exact" else f", {kv}"


def _rank(row: Mapping[str, Any]) -> tuple[bool, float]:
    return row["status"] == "OOM", row.get("ms", 0.0)


def _in_unit(value: float | None, factor: float) -> float:
    return float("nan") if value is None else value * factor


def _look(points: int, marker: str, level: bool) -> dict[str, Any]:
    """Points that a line may join; two suggest a course that nobody measured, a level is one measurement."""
    if level:
        return {"marker": "", "linestyle": "-", "linewidth": 1.4}
    return {"marker": marker, "linestyle": "-" if points > 2 else "", "markersize": 3.5 if points > 2 else 5}


def _plot_line(axes: Axes, points: list[tuple[float, float]], label: str, look: Mapping[str, Any]) -> None:
    x, y = zip(*points, strict=True)
    axes.plot(x, y, label=label or None, **look)
