"""Draws docs/figures/overview.png, the figure of the README: `python results/figures/overview.py`.

Scores are those of the shipped pattern. Losses are read from the tables of docs/lab/, so that figure and tables agree.
"""

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from duo_id import load_pattern
from duo_id.common.figures import COLORS, GATES, save_figure, style
from duo_id.patterns.heatmap import draw_heads
from duo_id.patterns.pattern import HeadPattern

DOCS = Path(__file__).parents[2] / "docs"
NOW, EARLIER = (DOCS / "lab" / f"{name}.md" for name in ("identification", "identification-earlier"))
TABLE = "At 8192 tokens alone:"  # the words above it in NOW
LENGTH = 8192
SPARSITIES = (0.25, 0.5, 0.625, 0.75, 0.875)  # columns of that table
RANDOM_SPARSITIES = (0.5, 0.75)  # columns of the first table of EARLIER
CONTENDERS = {  # by the first cell of their rows
    "`published`": ("DuoAttention's recipe", COLORS[1], "s"),
    "kvpress's static heads": ("kvpress's static heads", COLORS[2], "^"),
    "`best`": ("duo_id, experiment=best", COLORS[0], "o"),
}
HIGHEST = 0.65  # nats shown; random masks lie above
MEASURED = re.compile(r"(-?\d+\.\d+) ± (\d+\.\d+)")


def measured(text: str, name: str) -> np.ndarray:
    """Means and half intervals (columns, 2) in the row of a table that begins with `name`."""
    row = next(line for line in text.splitlines() if line.startswith(f"| {name} |"))
    return np.array(MEASURED.findall(row), dtype=float)


def kept(sparsities: Sequence[float], pattern: HeadPattern) -> np.ndarray:
    """The percentage of full attention's KV cache that masks of these sparsities keep at `LENGTH` tokens."""
    streaming = np.array([1 - pattern.binarize(sparsity=one).retrieval.double().mean().item() for one in sparsities])
    return 100 * (1 - streaming * (1 - (pattern.sink_size + pattern.recent_size) / LENGTH))


@style()
def draw() -> Figure:
    """The heads' scores, and the rise in loss over the KV cache kept."""
    pattern = load_pattern("SmolLM2-135M-Instruct")
    figure = Figure(figsize=(7.2, 3.9))
    heads, losses = figure.subplots(1, 2, width_ratios=(1, 4.2))
    draw_heads(heads, pattern.cells(), flat=False)
    heads.set(title="30 x 3 KV heads", xticks=range(pattern.scores.shape[1]))
    scale = ScalarMappable(Normalize(*pattern.cells().limits), GATES)
    bar = figure.colorbar(scale, ax=heads, location="left", label="score: need of the whole context", aspect=40)
    bar.outline.set_visible(False)
    _losses(losses, pattern)
    return figure


def _losses(axes: Axes, pattern: HeadPattern) -> None:
    table = NOW.read_text().partition(TABLE)[2]
    share = kept(SPARSITIES, pattern)
    axes.axhline(0, color="#555555", linestyle="--", linewidth=1)
    axes.annotate("full attention", (100, 0), xytext=(0, -4), textcoords="offset points", ha="right", va="top")
    for offset, (name, (label, color, marker)) in enumerate(CONTENDERS.items()):
        means, halves = measured(table, name).T
        points = share + 0.5 * (offset - 1)  # the README says so; intervals would cover each other
        axes.errorbar(points, means, halves, color=color, marker=marker, markersize=5, elinewidth=0.9, label=label)
    random = measured(EARLIER.read_text(), "random masks")
    for x, (mean, _) in zip(kept(RANDOM_SPARSITIES, pattern), random, strict=True):
        axes.annotate(
            f"random masks\n{mean:.2f}*",
            (x, HIGHEST),
            xytext=(0, -26),
            textcoords="offset points",
            ha="center",
            va="top",
            fontsize=8,
            arrowprops={"arrowstyle": "->", "color": "#555555"},
        )
    axes.set(xlim=(10, 100), ylim=(-0.1, HIGHEST), title="SmolLM2-135M-Instruct at 8K tokens, 18 tasks")
    axes.set(xlabel="KV cache kept (% of full attention's bytes)", ylabel="rise in answer loss (nats per token)")
    axes.grid(axis="y")
    axes.legend(loc="upper right", bbox_to_anchor=(1, 0.8))


if __name__ == "__main__":
    save_figure(draw(), DOCS / "figures" / "overview.png")
