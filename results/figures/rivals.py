"""Draws docs/figures/rivals.png: `python results/figures/rivals.py RUN_0.5B RUN_1.5B`, evaluation folders.

The runs score masks, spans and token eviction at the same shares of the cache, at 8192 and at 16,384 tokens, as in
docs/lab/log.md.
"""

import sys
from collections.abc import Mapping, Sequence
from math import log
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from duo_id.common.figures import COLORS, save_figure, style
from duo_id.report.summary import frame, load_results

FIGURE = Path(__file__).parents[2] / "docs" / "figures" / "rivals.png"
JUDGED = ("Qwen2.5-Coder-0.5B, 8192 tokens", "Qwen2.5-Coder-1.5B, 16,384 tokens")
READ_TWICE = ("kvgrad", "kvzip", "kvzip-plus")
COLOR = {"best": COLORS[0], "spans (spans)": COLORS[1], "published": COLORS[2]}
LABELS = {
    "best": "best, masks",
    "spans (spans)": "spans",
    "published": "published, masks",
    "random": "random masks",
    "cap": "CapKV",
    "compactor": "Compactor",
    "critical-ada-expected": "CriticalAdaKV",
    "cur": "CurDKV",
    "expected": "expected attention",
    "keydiff": "KeyDiff",
    "kvgrad": "KVgrad",
    "kvzip": "KVzip",
    "kvzip-plus": "KVzip+",
    "lagkv": "LagKV",
    "leverage": "leverage scores",
    "noncausal": "non-causal",
    "snapkv": "SnapKV",
}
OTHERS = "#AAAAAA"  # token eviction and random masks
MASKS_OF_SPANS = ["spans"]
KEYS = ["task", "index", "question"]
MOST_LACKING = 0.1  # share of the questions that a press may have left without an answer before it is left out


def divergence(results: Mapping[str, Any]) -> pd.DataFrame:
    """KL divergence a token by contender and share of the cache, over the questions that all answered."""
    rows = frame(results)
    rows = rows[rows["cache"].notna() & (rows["index"] == 0)].copy()
    rows["kl_each"] = rows["kl"] / rows["tokens"]
    rows["name"] = rows["heads"].str.removesuffix("/seed-0") + (rows["kind"] == "spans").map(
        {True: " (spans)", False: ""}
    )
    rows["question_key"] = rows[KEYS].astype(str).agg("/".join, axis=1)
    answered = rows.groupby("name")["question_key"].nunique()
    rows = rows[rows["name"].isin(answered[answered >= (1 - MOST_LACKING) * answered.max()].index)]
    common = set.intersection(*(set(of_name) for _, of_name in rows.groupby(["name", "cache"])["question_key"]))
    rows = rows[rows["question_key"].isin(common)]
    tasks = rows.groupby(["name", "cache", "task", "index"])["kl_each"].mean().groupby(["name", "cache", "task"]).mean()
    return tasks.groupby(["name", "cache"]).mean().unstack("name")


def draw(axes: Axes, table: pd.DataFrame) -> None:
    """A line for each contender, named beside its end; dashed where a context is read twice."""
    shown = table[table.iloc[-1].drop(MASKS_OF_SPANS, errors="ignore").sort_values().index]
    for name in shown:
        style_of = "--" if name in READ_TWICE else "-"
        axes.plot(100 * shown.index, shown[name], style_of, color=COLOR.get(str(name), OTHERS), linewidth=1.6)
    axes.set(yscale="log", xscale="log", xlabel="share of the full cache (%)", xlim=(14, 110))
    axes.set_xticks(100 * shown.index, [f"{100 * share:g}" for share in shown.index])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter("{x:g}")
    low, high = map(log, axes.get_ylim())
    place = 0.0
    for name, value in shown.iloc[-1].items():  # from the lowest line, no name upon another
        place = max((log(value) - low) / (high - low), place + 0.045)
        color = COLOR.get(str(name), "#444444")
        axes.annotate(LABELS.get(str(name), name), (0.68, place), xycoords="axes fraction", fontsize=7, color=color)


def main(runs: Sequence[str]) -> None:
    """Draw it."""
    if len(runs) != 2:
        sys.exit("give two evaluations: of Qwen2.5-Coder-0.5B at 8192 tokens and of the 1.5B at 16,384")
    with style():
        figure = Figure(figsize=(8, 4), layout="constrained")
        for axes, run, title in zip(figure.subplots(1, 2), runs, JUDGED, strict=True):
            draw(axes, divergence(load_results(run)))
            axes.set_title(title)
        figure.axes[0].set_ylabel("KL from full attention (nats per token)")
        save_figure(figure, FIGURE)


if __name__ == "__main__":
    main(sys.argv[1:])
