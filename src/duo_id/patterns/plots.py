"""Figures of head patterns: scores, their distribution, and masks.

Every function returns a new `matplotlib.figure.Figure`: no display is needed, and the style applies only inside the
call.
"""

from collections.abc import Sequence
from itertools import cycle

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import QuadMesh
from matplotlib.colors import Colormap, ListedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from duo_id.common.errors import UserError
from duo_id.common.figures import (
    COLORS,
    DASHES,
    GATES,
    UNGATED,
    draw_cells,
    hatch_ungated,
    number_heads,
    set_title,
    style,
)
from duo_id.patterns.pattern import HeadMask, HeadPattern

MASK_COLORS = ListedColormap([GATES(0.0), GATES(1.0)])  # streaming, retrieval


@style()
def plot_gates(pattern: HeadPattern, title: str | None = None, mask: HeadMask | None = None) -> Figure:
    """Heatmap of the scores, layers x KV heads, next to the mask if one is given.

    Layers run from top to bottom, or from left to right if there are more than twice as many layers as KV heads. Layers
    without gates are hatched.
    """
    layers, kv_heads = pattern.scores.shape
    flat = layers > 2 * kv_heads
    rows, columns = (kv_heads, layers) if flat else (layers, kv_heads)
    panels = 1 if mask is None else 2
    panel_columns = 1 if flat else panels
    width = 5.0 if flat or panels == 2 else 3.8
    cell = (width - 0.6 * panel_columns) / panel_columns / columns
    panel_height = min(max(rows * cell, 0.6, 0.15 * min(rows, 8)), 8.0)  # inches; room for the labels of 8 rows
    figure = Figure(figsize=(width, panel_height * panels / panel_columns + 0.45 * panels + 0.8 + 0.25 * bool(title)))
    grid = figure.subplots(panels // panel_columns, panel_columns, squeeze=False, sharex=True, sharey=True)
    axes: list[Axes] = list(grid.flat)

    label, low, high = _scale(pattern)
    image = _draw_heads(axes[0], pattern.scores.numpy(), pattern.gated_layers, flat, GATES, Normalize(low, high))
    axes[0].set_title(f"{label.split()[0]}s", loc="left")
    bar = figure.colorbar(image, ax=axes, location="bottom", label=label, aspect=40, fraction=0.08, shrink=0.7)
    bar.outline.set_visible(False)

    ungated = len(pattern.gated_layers) < layers
    if mask is not None:
        mask.check_fits(layers, kv_heads, "the pattern")
        _draw_heads(
            axes[1], mask.retrieval.numpy().astype(float), mask.gated_layers, flat, MASK_COLORS, Normalize(0, 1)
        )
        axes[1].set_title(f"{100 * mask.sparsity:.3g}% of the heads stream", loc="left")
        figure.legend(handles=_legend(ungated), loc="outside lower center", ncols=3)
    elif ungated:
        figure.legend(handles=[Patch(**UNGATED, label="no gates")], loc="outside lower center")
    set_title(figure, title)
    return figure


@style()
def plot_histogram(
    pattern: HeadPattern, title: str | None = None, sparsities: Sequence[float] = (0.25, 0.5, 0.75)
) -> Figure:
    """The distribution of the scores, and the score below which heads stream at each of `sparsities`."""
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
    """The mask `pattern.binarize(threshold=...)` for each of `thresholds`, one per panel.

    Raises:
        UserError: `thresholds` is empty.
    """
    if not len(thresholds):
        raise UserError("thresholds=() shows nothing: pass at least one score, such as thresholds=(0.5,)")
    layers, kv_heads = pattern.scores.shape
    flat = layers > 2 * kv_heads
    columns = 1 if flat else min(3, len(thresholds))
    rows = -(-len(thresholds) // columns)
    width, height = (4.8, min(max(0.15 * kv_heads, 0.45), 1.6)) if flat else (1.7, 1.7 * min(layers / kv_heads, 2))
    figure = Figure(figsize=(max(3.4, width * columns), (height + 0.3) * rows + 0.75 + 0.25 * bool(title)))
    grid = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    for axes, threshold in zip(grid.flat, thresholds, strict=False):
        mask = pattern.binarize(threshold=threshold)
        _draw_heads(axes, mask.retrieval.numpy().astype(float), mask.gated_layers, flat, MASK_COLORS, Normalize(0, 1))
        streaming = round(mask.sparsity * pattern.gated_heads)
        title_of = (f"below {threshold:g}:", f"{streaming} of {pattern.gated_heads} stream")
        axes.set_title((" " if flat else "\n").join(title_of), loc="left", fontsize=8)
    for unused in list(grid.flat)[len(thresholds) :]:
        unused.set_visible(False)
    for axes in grid.flat[len(thresholds) - columns : len(thresholds)]:  # the last of each column
        axes.tick_params(labelbottom=True)
        axes.set_xlabel("layer" if flat else "KV head")
    figure.legend(handles=_legend(len(pattern.gated_layers) < layers), loc="outside lower center", ncols=3)
    set_title(figure, title)
    return figure


def _scale(pattern: HeadPattern) -> tuple[str, float, float]:
    """Label and limits of the scores' colour scale: gates, or another kind of scores."""
    if pattern.holds_gates:
        return "gate α (1 = retrieval)", 0.0, 1.0
    low, high = (value.item() for value in pattern.scores[list(pattern.gated_layers)].aminmax())
    return "score (higher = retrieval)", low, high


def _draw_heads(
    axes: Axes, values: np.ndarray, gated: tuple[int, ...], flat: bool, colors: Colormap, limits: Normalize
) -> QuadMesh:
    """Draw one cell per head, values (layers, KV heads); with `flat`, layers run from left to right."""
    mesh = draw_cells(axes, values.T if flat else values, limits, colors=colors)
    hatch_ungated(axes, values.shape[0], values.shape[1], gated, flat)
    number_heads(axes, flat)
    return mesh


def _legend(ungated: bool) -> list[Patch]:
    """The legend entries of a mask."""
    kinds = zip(("retrieval", "streaming"), (MASK_COLORS(1.0), MASK_COLORS(0.0)), strict=True)
    patches = [Patch(facecolor=color, edgecolor="#555555", linewidth=0.5, label=name) for name, color in kinds]
    return [*patches, Patch(**UNGATED, label="no gates")] if ungated else patches
