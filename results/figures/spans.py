"""Draws docs/figures/spans-*.png: `python results/figures/spans.py SMOLLM2_RUN QWEN_RUN`, evaluation folders.

The runs evaluate spans and masks at the same shares of the cache, at 8192 and at 30,000 tokens, as in docs/lab/log.md.
"""

import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from duo_id.common.figures import COLORS, save_figure, style
from duo_id.patterns.saved import load_pattern
from duo_id.patterns.spans import ALL
from duo_id.report.summary import frame, load_results

ROOT = Path(__file__).parents[2]
FIGURES = ROOT / "docs" / "figures"
CONTENDERS = {"best, masks": ("pattern", "best"), "spans": ("spans", "")}  # kind, and how the names begin
JUDGED = ("SmolLM2-135M, 8192 tokens", "Qwen2.5-Coder-1.5B, 30,000 tokens")
OTHERS = "curvature|half"  # contenders that are left out
CACHE, LENGTH = 0.274, 8192  # at which the spans of heads are drawn
ALLOCATED = {  # heads, and at which length their spans are counted
    "SmolLM2-135M, 8192 tokens": ("spans", LENGTH),
    "Qwen2.5-Coder-0.5B, 30,000": ("qwen2.5-coder-0.5b/spans", 30_000),
    "Qwen2.5-Coder-1.5B, 30,000": ("qwen2.5-coder-1.5b/spans", 30_000),
}


def draw_divergence(axes: Axes, results: Mapping[str, Any]) -> None:
    """KL divergence over the share of the cache, tasks weighing the same: a point for each seed, lines for their means.

    Args:
        axes: to draw on.
        results: as in results.json.
    """
    rows = frame(results)
    rows["kl_each"] = rows["kl"] / rows["tokens"]
    for (label, (kind, name)), color in zip(CONTENDERS.items(), COLORS, strict=False):
        chosen = rows[(rows["kind"] == kind) & rows["heads"].str.startswith(name) & rows["cache"].notna()]
        chosen = chosen[~chosen["heads"].str.contains(OTHERS)]
        tasks = chosen.groupby(["heads", "seed", "cache", "task"], dropna=False)["kl_each"].mean()
        seeds = tasks.groupby(["heads", "seed", "cache"], dropna=False).mean().reset_index()
        axes.plot(100 * seeds["cache"], seeds["kl_each"], "o", color=color, alpha=0.5, markersize=4)
        means: pd.Series = seeds.groupby("cache")["kl_each"].mean()
        axes.plot(100 * means.index, means, color=color, label=label)
    axes.set(yscale="log", xlabel="share of the full cache (%)")


def draw_counts() -> Figure:
    """How many heads of each model see how far."""
    figure = Figure(figsize=(8, 2.6), layout="constrained")
    for axes, (title, (name, length)) in zip(figure.subplots(1, len(ALLOCATED)), ALLOCATED.items(), strict=True):
        spans = load_pattern(ROOT / "results/heads" / name / "seed-0").allocate(cache=CACHE, length=length).spans
        values = Counter(sorted(spans.flatten().tolist(), key=lambda span: (span == ALL, span)))
        names = ["all" if span == ALL else f"{span:,}" for span in values]
        colors = [COLORS[1 if span == ALL else 0] for span in values]
        axes.bar_label(axes.bar(names, list(values.values()), color=colors, width=0.7), fontsize=8, padding=1)
        axes.tick_params(axis="x", rotation=40)
        axes.margins(y=0.1)
        axes.set_title(title)
        axes.set_ylabel(f"KV heads (of {spans.numel()})")
        axes.grid(axis="y")
    figure.supxlabel("attention span (tokens beside the sink)", fontsize=9)
    return figure


def main(runs: Sequence[str]) -> None:
    """Draw them."""
    if len(runs) != 2:
        sys.exit("give two evaluations: of SmolLM2 at 8192 tokens and of Qwen2.5-Coder-1.5B at 30,000")
    with style():
        figure = Figure(figsize=(8, 3.2), layout="constrained")
        panels = figure.subplots(1, 2, sharey=True)
        for axes, run, title in zip(panels, runs, JUDGED, strict=True):
            draw_divergence(axes, load_results(run))
            axes.set_title(title)
        panels[0].yaxis.set_major_formatter("{x:g}")
        panels[0].set_ylabel("KL from full attention (nats per token)")
        panels[0].legend(frameon=False)
        save_figure(figure, FIGURES / "spans-divergence.png")
    spans = load_pattern(ROOT / "results/heads/spans/seed-0").allocate(cache=CACHE, length=LENGTH)
    save_figure(spans.plot(), FIGURES / "spans-heads.png")
    with style():
        save_figure(draw_counts(), FIGURES / "spans-counts.png")


if __name__ == "__main__":
    main(sys.argv[1:])
