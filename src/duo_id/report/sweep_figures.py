"""Figures of a sweep: losses by setting, the course of the search, and the agreement of its patterns."""

from collections import Counter
from itertools import cycle

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from duo_id.common.figures import COLORS, DASHES, MARKERS, style
from duo_id.patterns.agreement import plain, plot_agreement
from duo_id.report.sweeps import Job, Sweep

SHOWN, COMPARED = 6, 12  # settings in colour, others are grey; patterns whose agreement is shown
GREY = "#BBBBBB"


def sweep_figures(sweep: Sweep) -> dict[str, Figure]:
    """All figures that the sweep has data for, by caption."""
    figures = {}
    if any(set(job.losses) - {0} for job in sweep.ended):
        caption = "Answer loss on test samples over the share of streaming KV heads, by setting. Bars: smallest to "
        figures[caption + f"largest over seeds. In colour: the best {SHOWN} by validation loss."] = plot_losses(sweep)
    if sweep.optimised and sweep.ended:
        figures["Validation loss of each job, and the best so far."] = plot_history(sweep)
    comparable = _comparable_jobs(sweep)
    if len(comparable) > 1:
        sparsities = sorted({sparsity for job in comparable for sparsity in job.losses} - {0, 1})
        patterns = {f"job {job.name}": job.pattern for job in comparable[:COMPARED] if job.pattern is not None}
        best = f" The best {COMPARED} of {len(comparable)} jobs." if len(comparable) > COMPARED else ""
        caption = (
            "Agreement between the patterns of the jobs: Spearman's correlation of all scores, and the retrieval heads "
        )
        caption += f"shared by two patterns as a fraction of those in either.{best}"
        figures[caption] = plot_agreement(patterns, sparsities)
    return figures


@style()
def plot_losses(sweep: Sweep) -> Figure:
    """Answer loss over sparsity, one line per setting; the dashed line is full attention."""
    figure = Figure(figsize=(4.8, 3.4 + 0.17 * min(SHOWN, len(sweep.settings))))
    axes = figure.subplots()
    looks = zip(COLORS, MARKERS, cycle(DASHES), strict=False)
    for name, jobs in sweep.settings.items():
        color, marker, dash = next(looks, (GREY, "", "-"))
        sparsities = sorted({sparsity for job in jobs for sparsity in job.losses} - {0})
        losses = [[job.losses[sparsity] for job in jobs if sparsity in job.losses] for sparsity in sparsities]
        means = np.array([np.mean(values) for values in losses])
        percentages = [100 * sparsity for sparsity in sparsities]
        ends = np.array([[min(values), max(values)] for values in losses]).T
        label = plain(name, 60) if marker else None
        axes.errorbar(
            percentages, means, abs(ends - means), color=color, marker=marker, markersize=4,
            linestyle=dash if len(means) > 2 or not marker else "",
            label=label, linewidth=1.4 if marker else 0.7, elinewidth=0.8, capsize=2, zorder=2 if marker else 1,
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
    """The objective of each job over its number, and the best so far; failed jobs are marked at the bottom."""
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


def _comparable_jobs(sweep: Sweep) -> list[Job]:
    """The jobs whose patterns are of the most frequent model."""
    with_pattern = [job for job in sweep.ended if job.pattern is not None]
    models = Counter(_model_identity(job) for job in with_pattern)
    return [job for job in with_pattern if _model_identity(job) == models.most_common(1)[0][0]]


def _model_identity(job: Job) -> tuple[object, ...]:
    assert job.pattern is not None
    return (str((job.summary or {}).get("model", {}).get("id")), *job.pattern.scores.shape)
