"""Draws docs/figures/two-heads.png: `python results/figures/two_heads.py`."""

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MultipleLocator

from duo_id.attention.window import Window
from duo_id.common.figures import save_figure
from duo_id.patterns.plots import COLORS, style

TOKENS, NEEDLE = 24, 9
WINDOW = Window(sink_size=3, recent_size=6)
HEADS = {"retrieval head": Window(0, TOKENS), "streaming head": WINDOW}  # a window of all tokens is full attention
KINDS = ("unseen", "seen", "sink", "needle")
PALETTE = ("white", COLORS[4], COLORS[0], COLORS[1])


def kinds(window: Window) -> np.ndarray:
    """What each key is to each query, an index of `KINDS`: (queries, keys)."""
    queries, keys = np.indices((TOKENS, TOKENS))
    seen = window.sees(queries, keys)
    return np.where(seen & (keys == NEEDLE), 3, np.where(seen & (keys < window.sink_size), 2, seen))


@style()
def draw() -> Figure:
    """What the two kinds of heads see, and below what the cache holds of each after the last token."""
    figure = Figure(figsize=(6.4, 4.5))
    grid = figure.subplots(2, 2, height_ratios=(TOKENS, 2), sharex="col")
    for column, (name, window) in enumerate(HEADS.items()):
        seen = kinds(window)
        above, below = grid[:, column]
        _cells(above, seen)
        above.set_title(f"{name}: {'sees every token' if column == 0 else 'sees sink and recent'}", loc="left")
        above.yaxis.set_major_locator(MultipleLocator(4))
        _cells(below, seen[-1:])
        below.set(xlabel="key (position)", yticks=[])
        below.xaxis.set_major_locator(MultipleLocator(4))
        below.set_title(f"in the cache: {np.count_nonzero(seen[-1])} of {TOKENS} tokens", loc="left")
    grid[0, 0].set_ylabel("query (position)")
    labels = {"needle": "the needle", "seen": "seen", "sink": "seen: the sink", "unseen": "not seen, not kept"}
    keys = [
        Patch(facecolor=PALETTE[KINDS.index(kind)], edgecolor="#555555", linewidth=0.5, label=label)
        for kind, label in labels.items()
    ]
    figure.legend(handles=keys, loc="outside lower center", ncols=4)
    return figure


def _cells(axes: Axes, values: np.ndarray) -> None:
    """One cell a query and key, queries downward."""
    rows, columns = (np.arange(size + 1) - 0.5 for size in values.shape)
    colors = {"cmap": ListedColormap(PALETTE), "vmin": 0, "vmax": len(KINDS) - 1}
    axes.pcolormesh(columns, rows, values, edgecolors="#E4E4E4", linewidth=0.4, **colors)
    axes.set_ylim(rows[-1], rows[0])
    axes.spines[:].set(visible=True, linewidth=0.5, color="#555555")


if __name__ == "__main__":
    save_figure(draw(), Path(__file__).parents[2] / "docs" / "figures" / "two-heads.png")
