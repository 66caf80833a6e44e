"""Draws docs/figures/identification-*.png: `python results/figures/identification.py RUN ...`, evaluation folders.

The runs evaluate the heads in results/heads under the names of the folders there, on the tasks, lengths and sparsities
of docs/lab/identification.md. Several runs may share the work, by tasks or by heads.
"""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from duo_id.common.figures import save_figure
from duo_id.patterns.agreement import plot_agreement, plot_patterns
from duo_id.report.figures import plot_budget, plot_cost, plot_depths, plot_tasks
from duo_id.report.leaderboard import average_over_seeds
from duo_id.report.runs import merge
from duo_id.report.summary import contender_of, frame, load_results

FIGURES = Path(__file__).parents[2] / "docs" / "figures"
COMPARED = ("published", "kvpress", "best")  # side by side for each task
NEEDLES = "needle-words"  # the task shown by depth and length
GOOD = ("best", "search", "fisher-mixture", "kvpress", "reconstruction", "query", "published")  # best first
SPARSITIES = (0.5, 0.75)


def draw(results: Mapping[str, Any]) -> dict[str, Figure]:
    """The figures, by the ends of their names.

    Args:
        results: as in results.json, of all the heads in `GOOD` at the sparsities in `SPARSITIES` and others.
    """
    rows = frame(results)
    full = rows["kind"] == "full"
    measured = rows[full | rows["heads"].isin(GOOD)]
    patterns = average_over_seeds(results["patterns"])
    ranked = {name: patterns[name] for name in GOOD}
    compared = rows[full | rows["heads"].isin(COMPARED) & rows["sparsity"].isin(SPARSITIES)]
    return {
        "tasks": plot_tasks(compared, "rise"),
        "depths": plot_depths(compared, NEEDLES, "accuracy"),
        "budget": plot_budget(measured, "rise"),
        "cost": plot_cost(rows[full | rows["sparsity"].isin(SPARSITIES)], least_seconds(results["patterns"])),
        "agreement": plot_agreement(ranked, SPARSITIES),
        "heads": plot_patterns(ranked, ranks=True),
    }


def least_seconds(patterns: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """The time of each contender's fastest seed, since the others may have shared the GPU or compiled."""
    fastest: dict[str, float] = {}
    for name, pattern in patterns.items():
        seconds, heads = pattern["provenance"].get("seconds"), contender_of(name)
        if seconds:
            fastest[heads] = min(seconds, fastest.get(heads, seconds))
    return fastest


def main(runs: Sequence[str]) -> None:
    """Draw them from saved evaluations, which together must be one."""
    merged = merge([load_results(run) for run in runs])
    contenders = {contender_of(name) for results in merged for name in results["patterns"]}
    missing = sorted(set(GOOD) - contenders)
    if missing or len(merged) != 1:
        sys.exit(f"give evaluations of the same samples; these lack {', '.join(missing) or 'nothing, but differ'}")
    (results,) = merged
    for name, figure in draw(results).items():
        save_figure(figure, FIGURES / f"identification-{name}.png")


if __name__ == "__main__":
    main(sys.argv[1:])
