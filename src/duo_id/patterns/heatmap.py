"""The heatmap of scores and masks, from plain arrays: how head patterns draw themselves."""

from typing import Any

from matplotlib.axes import Axes
from matplotlib.collections import QuadMesh
from matplotlib.colorbar import Colorbar
from matplotlib.colors import Colormap, ListedColormap, LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from duo_id.common.figures import COLORS, GATES, UNGATED, draw_cells, hatch_ungated, number_heads, set_title, style
from duo_id.patterns.cells import Cells

MASK_COLORS = ListedColormap([GATES(0.0), GATES(1.0)])  # streaming, retrieval
ALL_TOKENS = COLORS[1]  # the colour of spans of all tokens, which no shade of the others comes near
SPAN_COLORS = GATES.with_extremes(over=ALL_TOKENS)
MOST_TICKS = 8


@style()
def plot_heads(scores: Cells, mask: Cells | None = None, title: str | None = None) -> Figure:
    """Heatmap of scores or spans, layers x KV heads, next to the mask if one is given.

    Layers run from top to bottom, or from left to right if there are more than twice as many layers as KV heads.
    """
    layers, kv_heads = scores.values.shape
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

    image = draw_heads(axes[0], scores, flat)
    axes[0].set_title(f"{scores.label.split()[0]}s", loc="left")
    beyond: dict[str, Any] = {"extend": "max", "extendrect": True, "extendfrac": 0.08} if scores.spans else {}
    bar = figure.colorbar(
        image, ax=axes, location="bottom", label=scores.label, aspect=40, fraction=0.08, shrink=0.7, **beyond
    )
    bar.outline.set_visible(False)
    if scores.spans:
        _number_spans(bar, scores)

    ungated = len(scores.gated_layers) < layers
    if mask is not None:
        draw_heads(axes[1], mask, flat, MASK_COLORS)
        axes[1].set_title(mask.label, loc="left")
        figure.legend(handles=mask_legend(ungated), loc="outside lower center", ncols=3)
    elif ungated:
        figure.legend(handles=[Patch(**UNGATED, label="no gates")], loc="outside lower center")
    set_title(figure, title)
    return figure


def _number_spans(bar: Colorbar, spans: Cells) -> None:
    """Label a colour bar with the spans there are, or with powers of 2 if they are many; all tokens at its end."""
    low, high = spans.limits
    shown = sorted({span for span in spans.values.flat if low <= span <= high})
    powers = [2**power for power in range(25) if low <= 2**power <= high]
    step = -(-len(powers) // MOST_TICKS)
    ticks = shown if len(shown) <= MOST_TICKS else powers[::step]
    bar.set_ticks(ticks, labels=[f"{tick:g}" if tick < 10_000 else f"{tick / 1024:g}K" for tick in ticks])
    bar.minorticks_off()
    place: dict[str, Any] = {"xycoords": "axes fraction", "textcoords": "offset points", "ha": "center", "va": "top"}
    bar.ax.annotate("all", (1.04, 0), (0, -5.5), fontsize=8, **place)


def draw_heads(axes: Axes, cells: Cells, flat: bool, colors: Colormap = GATES) -> QuadMesh:
    """Draw one cell per head; with `flat`, layers run from left to right."""
    values = cells.values.astype(float)
    scale, colors = (LogNorm(*cells.limits), SPAN_COLORS) if cells.spans else (Normalize(*cells.limits), colors)
    mesh = draw_cells(axes, values.T if flat else values, scale, colors=colors)
    hatch_ungated(axes, values.shape[0], values.shape[1], cells.gated_layers, flat)
    number_heads(axes, flat)
    return mesh


def mask_legend(ungated: bool) -> list[Patch]:
    """The legend entries of a mask."""
    kinds = zip(("retrieval", "streaming"), (MASK_COLORS(1.0), MASK_COLORS(0.0)), strict=True)
    patches = [Patch(facecolor=color, edgecolor="#555555", linewidth=0.5, label=name) for name, color in kinds]
    return [*patches, Patch(**UNGATED, label="no gates")] if ungated else patches
