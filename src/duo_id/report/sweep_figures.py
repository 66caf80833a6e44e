"""Figures of a sweep: losses of its settings, the course of the search, and how far its runs name the same heads."""

from collections import Counter
from itertools import cycle

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from duo_id.common.figures import COLORS, DASHES, MARKERS, style
from duo_id.patterns.agreement import plain, plot_agreement
from duo_id.report.sweeps import Job, Sweep

SHOWN, COMPARED = 6, 12  # settings in colour, the others are grey; patterns whose agreement is shown
GREY = "#BBBBBB"


def sweep_figures(sweep: Sweep) -> dict[str, Figure]:
    """All figures for which the sweep holds enough, each under its caption."""
    found = {}
    if any(set(job.losses) - {0} for job in sweep.ended):
        captions = "Answer loss on test samples over the KV heads that stream, by setting. Bars: from the least to the "
        found[captions + f"largest over seeds. In colour: the best {SHOWN} by validation loss."] = plot_losses(sweep)
    if sweep.optimised and sweep.ended:
        found["Validation loss of each job, and the best so far."] = plot_history(sweep)
    alike = _alike(sweep)
    if len(alike) > 1:
        sparsities = sorted({sparsity for job in alike for sparsity in job.losses} - {0, 1})
        patterns = {f"job {job.name}": job.pattern for job in alike[:COMPARED] if job.pattern is not None}
        best = f" The best {COMPARED} of {len(alike)} jobs." if len(alike) > COMPARED else ""
        caption = (
            "How far the patterns of the jobs agree: Spearman's correlation of all scores, and the retrieval heads "
        )
        caption += f"that two share as a part of those that at least one of them has.{best}"
        found[caption] = plot_agreement(patterns, sparsities)
    return found


@style()
def plot_losses(sweep: Sweep) -> Figure:
    """Answer loss over sparsity, a line for each setting; the dashed line is full attention."""
    figure = Figure(figsize=(4.8, 3.4 + 0.17 * min(SHOWN, len(sweep.settings))))
    axes = figure.subplots()
    looks = zip(COLORS, MARKERS, cycle(DASHES), strict=False)
    for name, jobs in sweep.settings.items():
        color, marker, dash = next(looks, (GREY, "", "-"))
        sparsities = sorted({sparsity for job in jobs for sparsity in job.losses} - {0})
        losses = [[job.losses[one] for job in jobs if one in job.losses] for one in sparsities]
        middle, places = np.array([np.mean(values) for values in losses]), [100 * one for one in sparsities]
        ends = np.array([[min(values), max(values)] for values in losses]).T
        label = plain(name, 60) if marker else None
        axes.errorbar(
            places, middle, abs(ends - middle), color=color, marker=marker, markersize=4, linestyle=dash, label=label,
            linewidth=1.4 if marker else 0.7, elinewidth=0.8, capsize=2, zorder=2 if marker else 1,
        )  # fmt: skip
    full = [job.losses[0] for job in sweep.ended if 0 in job.losses]
    if full:
        axes.axhline(float(np.mean(full)), color="#555555", linestyle="--", linewidth=1.0, label="full attention")
    axes.set(xlabel="KV heads that stream (%)", ylabel="answer loss (nats per token)")
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.grid(axis="y")
    figure.legend(loc="outside lower center")
    return figure


@style()
def plot_history(sweep: Sweep) -> Figure:
    """The objective of each job over its number, and the best so far; failed jobs stand at the bottom."""
    figure = Figure(figsize=(4.8, 2.8))
    axes = figure.subplots()
    numbers = [number for number, job in enumerate(sweep.jobs) if np.isfinite(job.objective)]
    values = [sweep.jobs[number].objective for number in numbers]
    axes.plot(numbers, values, "o", color=COLORS[0], markersize=4, label="job")
    axes.step(numbers, np.minimum.accumulate(values), where="post", color=COLORS[1], label="best so far")
    failed = [number for number, job in enumerate(sweep.jobs) if not job.summary]
    if failed:
        bottom = axes.get_xaxis_transform()
        axes.plot(failed, [0.03] * len(failed), "x", color=COLORS[5], markersize=5, transform=bottom, label="failed")
    axes.set(xlabel="job", ylabel="validation loss\n(nats per token)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(axis="y")
    figure.legend(loc="outside lower center", ncols=3)
    return figure


def _alike(sweep: Sweep) -> list[Job]:
    """The jobs whose patterns are of one model: the one that most of them have."""
    found = [job for job in sweep.ended if job.pattern is not None]
    models = Counter(_model(job) for job in found)
    return [job for job in found if _model(job) == models.most_common(1)[0][0]]


def _model(job: Job) -> tuple[object, ...]:
    assert job.pattern is not None
    return (str((job.summary or {}).get("model", {}).get("id")), *job.pattern.scores.shape)
