"""Figures of head patterns: scores, their distribution, masks, and how many heads have which span.

Every function returns a new `matplotlib.figure.Figure`: no display is needed, and the style applies only inside the
call.
"""

from collections import Counter
from collections.abc import Sequence
from itertools import cycle

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from duo_id.common.errors import UserError
from duo_id.common.figures import (
    COLORS,
    DASHES,
    set_title,
    style,
)
from duo_id.patterns.heatmap import ALL_TOKENS, MASK_COLORS, draw_heads, mask_legend
from duo_id.patterns.pattern import HeadPattern
from duo_id.patterns.spans import ALL, HeadSpans

MOST_BARS = 12


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
    axes.set(xlabel=pattern.cells().label, ylabel=f"KV heads (of {len(scores)})")
    axes.grid(axis="y")
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    figure.legend(loc="outside lower center")
    set_title(figure, title)
    return figure


@style()
def plot_spans(spans: HeadSpans, title: str | None = None) -> Figure:
    """How many heads have which attention span: a bar a span, or a bar a power of 2 where there are many."""
    values = spans.spans[list(spans.gated_layers)].flatten().tolist()
    limited = [span for span in values if span != ALL]
    many = len({*limited}) > MOST_BARS
    upper = [2 ** (span - 1).bit_length() if many else span for span in limited]
    bars = Counter(sorted(upper))
    names = [f"{'to ' * many}{span:,}" for span in bars] + ["all"]
    counts = [*bars.values(), len(values) - len(limited)]
    figure = Figure(figsize=(max(3.4, 1.0 + 0.5 * len(names)), 2.8))
    axes = figure.subplots()
    drawn = axes.bar(range(len(names)), counts, color=[COLORS[0]] * len(bars) + [ALL_TOKENS], width=0.7)
    axes.bar_label(drawn, fontsize=8, padding=1)
    axes.set_xticks(range(len(names)), names, rotation=30 if len(names) > 6 else 0)
    share = f"beside a sink of {spans.sink_size}" if spans.sink_size else "without a sink"
    axes.set(xlabel=f"attention span (tokens, {share})", ylabel=f"KV heads (of {len(values)})")
    axes.grid(axis="y")
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
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
        draw_heads(axes, mask.cells(), flat, MASK_COLORS)
        streaming = round(mask.sparsity * pattern.gated_heads)
        title_of = (f"below {threshold:g}:", f"{streaming} of {pattern.gated_heads} stream")
        axes.set_title((" " if flat else "\n").join(title_of), loc="left", fontsize=8)
    for unused in list(grid.flat)[len(thresholds) :]:
        unused.set_visible(False)
    for axes in grid.flat[len(thresholds) - columns : len(thresholds)]:  # the last of each column
        axes.tick_params(labelbottom=True)
        axes.set_xlabel("layer" if flat else "KV head")
    figure.legend(handles=mask_legend(len(pattern.gated_layers) < layers), loc="outside lower center", ncols=3)
    set_title(figure, title)
    return figure
