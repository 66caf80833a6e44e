"""Head patterns of one model side by side: their scores, and how well they agree on the heads."""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from duo_id.common.figures import UNGATED, draw_cells, hatch_ungated, number_heads, plain, style
from duo_id.common.tables import TextTable
from duo_id.patterns.combining import normalized_ranks
from duo_id.patterns.pattern import HeadPattern


def agreement(patterns: Mapping[str, HeadPattern], sparsities: Sequence[float]) -> dict[str, pd.DataFrame]:
    """How well patterns of one model agree, over the layers that are gated in all of them.

    Returns:
        square frames over the patterns' names: Spearman's rank correlation of the scores, then for each sparsity the
        Jaccard index of the retrieval heads (size of the intersection over size of the union).
    """
    gated = sorted(set.intersection(*(set(pattern.gated_layers) for pattern in patterns.values())))
    scores = pd.DataFrame({name: pattern.scores[gated].flatten().numpy() for name, pattern in patterns.items()})
    frames = {"rank correlation\nof the scores": scores.rank().corr()}
    for sparsity in sparsities:
        masks = [
            pattern.binarize(sparsity=sparsity).retrieval[gated].flatten().numpy() for pattern in patterns.values()
        ]
        shared = [[_jaccard(mask, other) for other in masks] for mask in masks]
        title = f"shared retrieval heads\n{100 * sparsity:.4g}% stream"
        frames[title] = pd.DataFrame(shared, list(patterns), list(patterns))
    return frames


def agreement_table(patterns: Mapping[str, HeadPattern], sparsities: Sequence[float]) -> TextTable:
    """The agreement of at least two patterns for the terminal: mean and minimum over their pairs."""
    rows = []
    for title, frame in agreement(patterns, sparsities).items():
        pairs = frame.to_numpy()[np.triu_indices(len(frame), 1)]
        rows.append((title.replace("\n", ", "), f"{pairs.mean():.2f}", f"{pairs.min():.2f}"))
    return TextTable(("agreement", "mean", "minimum"), {"": rows}, f"{len(patterns)} runs")


@style()
def plot_patterns(patterns: Mapping[str, HeadPattern], ranks: bool = False) -> Figure:
    """The scores of patterns of one model on one colour scale: layers down, KV heads to the right.

    Args:
        patterns: by name.
        ranks: show each head's rank in its pattern, from 0 (streams first) to 1, instead of its score, for methods
            whose scores have different scales.
    """
    layers, kv_heads = next(iter(patterns.values())).scores.shape
    columns = min(len(patterns), 4)
    rows = -(-len(patterns) // columns)
    width = min(2.6, max(1.6, 0.14 * kv_heads + 0.4))
    height = min(5.0, max(1.2, 0.1 * layers))
    figure = Figure(figsize=(max(3.4, 0.5 + width * columns), 1.0 + (height + 0.35) * rows))
    grid = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    values = {name: _rank_matrix(pattern) if ranks else pattern.scores.numpy() for name, pattern in patterns.items()}
    scores = np.concatenate([values[name][list(pattern.gated_layers)].flatten() for name, pattern in patterns.items()])
    gates = all(pattern.holds_gates for pattern in patterns.values())
    scale = Normalize(0, 1) if gates or ranks else Normalize(scores.min(), scores.max())
    for axes, (name, pattern) in zip(grid.flat, patterns.items(), strict=False):
        mesh = draw_cells(axes, values[name], scale)
        hatch_ungated(axes, layers, kv_heads, pattern.gated_layers)
        axes.set_title(plain(name, 12 * width), loc="left", fontsize=8)
        number_heads(axes)
    for axes in list(grid.flat)[len(patterns) :]:
        axes.set_visible(False)
    label = "gate α (1 = retrieval)" if gates else "score (higher = retrieval)"
    if ranks:
        label = "rank of the head (1 = the last to stream)"
    bar = figure.colorbar(mesh, ax=grid, location="bottom", label=label, aspect=40, shrink=0.8)
    bar.outline.set_visible(False)
    if any(len(pattern.gated_layers) < layers for pattern in patterns.values()):
        figure.legend(handles=[Patch(**UNGATED, label="no gates")], loc="outside lower center")
    return figure


@style()
def plot_agreement(patterns: Mapping[str, HeadPattern], sparsities: Sequence[float]) -> Figure:
    """`agreement` as annotated matrices."""
    frames = agreement(patterns, sparsities)
    columns = min(len(frames), 4)
    rows = -(-len(frames) // columns)
    side = max(1.3, 0.36 * len(patterns))
    figure = Figure(figsize=(1.4 + side * columns, 1.3 + (side + 0.4) * rows))
    grid = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    names = [plain(name, 18) for name in patterns]
    for axes, (title, values) in zip(grid.flat, frames.items(), strict=False):
        draw_cells(axes, values.to_numpy(), Normalize(0, 1), "{:.2f}")
        axes.set_title(title, loc="left", fontsize=8)
        axes.set_xticks(range(len(names)), names, rotation=90)
        axes.set_yticks(range(len(names)), names)
    for axes in list(grid.flat)[len(frames) :]:
        axes.set_visible(False)
    return figure


def _rank_matrix(pattern: HeadPattern) -> np.ndarray:
    """The ranks of a pattern's heads, (layers, KV heads) in [0, 1]; layers without gates are 1."""
    gated, ranks = list(pattern.gated_layers), np.ones(pattern.scores.shape)
    ranks[gated] = normalized_ranks(pattern.scores[gated]).numpy()
    return ranks


def _jaccard(mask: np.ndarray, other: np.ndarray) -> float:
    either = (mask | other).sum()
    return float((mask & other).sum() / either) if either else 1.0
