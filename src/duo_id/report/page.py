"""One self-contained HTML page for any set of runs: tables, figures and answers."""

import io
import json
import re
import warnings
from base64 import b64encode
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape
from matplotlib.figure import Figure

from duo_id.common.errors import UserError
from duo_id.patterns.agreement import plot_agreement, plot_patterns
from duo_id.report.budgets import Budget, budgets_of
from duo_id.report.figures import figures
from duo_id.report.leaderboard import average_over_seeds, leaderboards
from duo_id.report.paired import paired_grids
from duo_id.report.rows import QUESTION, SAMPLE
from duo_id.report.runs import RunFolder, free_name, merge
from duo_id.report.summary import REPORTED, contender_of, frame, name_of
from duo_id.report.sweep_figures import sweep_figures
from duo_id.report.sweeps import CAPTION, Sweep, grids
from duo_id.report.tables import Cell, Grid, contender_grid, headline, middle, of_generated, task_grid
from duo_id.train.plots import plot_training

LARGEST_SVG = 200_000  # characters; a larger figure becomes a PNG
ANSWER, ANSWERS = 60, 8  # characters shown per answer; contenders per task
INTERVALS = "Bands and thin lines: 95% intervals."
CAPTIONS = {  # of figures, by the beginning of their name; its rest is the task
    "budget-score": f"Score of the generated answers over the fraction of the KV cache kept. {INTERVALS}",
    "budget-accuracy": f"Token accuracy of the right answers over the fraction of the KV cache kept. {INTERVALS}",
    "budget-rise": f"Rise of the answer loss over full attention's, by the fraction of the KV cache kept. {INTERVALS}",
    "budget-kl": f"KL from full attention at the answers' tokens, by the fraction of the KV cache kept. {INTERVALS}",
    "cost": f"Rise in answer loss over the time that identifying the heads took. {INTERVALS}",
    "tasks": f"Each task relative to full attention (dashed), by what is kept. {INTERVALS} "
    "Tasks on which full attention scores 0 are left out.",
    "depths-": "{task}: by context length and depth of the answer, 0% being the beginning of the context. KV: the "
    "fraction of the cache kept.",
    "position-": "{task}: loss by position of the answer in the context, all lengths together.",
}
PageFigure = dict[str, Any]


def report(
    runs: Sequence[RunFolder],
    announce: Callable[[str], None] = lambda text: None,
    sweeps: Sequence[Sweep] = (),
    reference: str | None = None,
) -> str:
    """The page: a section per sweep, then per model, with its evaluations, head patterns and training runs.

    Args:
        runs: to show; at least one, or a sweep.
        announce: called with the current step, for progress.
        sweeps: to show, each with a finished job.
        reference: the heads that others are compared with; None, or not in an evaluation: its first ones.

    Raises:
        UserError: a run holds a broken head pattern or values that are not numeric, or no evaluation has the reference.
    """
    models: dict[tuple[str, ...], list[RunFolder]] = {}
    for run in runs:
        models.setdefault(tuple(str(run.model.get(key)) for key in ("name", "id", "revision")), []).append(run)
    merged = {model: merge([run.results for run in of_model if run.results]) for model, of_model in models.items()}
    references = list(
        dict.fromkeys(name for of_model in merged.values() for results in of_model for name in _heads(results))
    )
    if reference not in (None, *references):
        raise UserError(
            f"reference={reference}: no such heads in these results, choose among {', '.join(references) or 'none'}"
        )
    pictures = FigureEmbedder(announce)
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    sections = [_section(model[0], of_model, merged[model], pictures, reference) for model, of_model in models.items()]
    sweep_sections = [_sweep(sweep, pictures) for sweep in sweeps]
    page = environment.get_template("page.html.j2").render(sections=sections, sweeps=sweep_sections)
    return re.sub(r"[\x00-\x08\x0b-\x1f]", "\N{REPLACEMENT CHARACTER}", page)  # answers may hold anything


class FigureEmbedder:
    """Embeds figures in a page, each with unique ids."""

    def __init__(self, announce: Callable[[str], None]) -> None:
        self.announce, self.count = announce, 0

    def __call__(self, figure: Figure, caption: str) -> PageFigure:
        """The figure with its caption: as SVG, or as PNG if the SVG is large."""
        self.count += 1
        self.announce(f"drawing figure {self.count}")
        width = round(96 * figure.get_figwidth())  # CSS has 96 pixels an inch
        settings: dict[Any, Any] = {"svg.fonttype": "none", "svg.hashsalt": f"figure {self.count}"}
        with mpl.rc_context(settings), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Glyph")  # readers' fonts have more glyphs than ours
            text = io.StringIO()
            figure.savefig(text, format="svg")
            if len(text.getvalue()) <= LARGEST_SVG:
                return {"caption": caption, "width": width, "image": Markup(self._inline(text.getvalue(), caption))}
            data = io.BytesIO()
            figure.savefig(data, format="png")
        image = Markup('<img src="data:image/png;base64,{}" alt="{}">')
        source = b64encode(data.getvalue()).decode()
        return {"caption": caption, "width": width, "image": image.format(source, caption)}

    def _inline(self, svg: str, caption: str) -> str:
        """The SVG element alone, without unreferenced ids."""
        svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
        used, prefix = set(re.findall(r'(?:url\(#|href="#)([^")]+)', svg)), f"f{self.count}-"
        svg = re.sub(r' id="([^"]*)"', lambda match: f' id="{prefix}{match[1]}"' if match[1] in used else "", svg)
        svg = re.sub(r'(url\(#|href="#)', rf"\g<1>{prefix}", svg)
        return svg.replace("<svg", f'<svg role="img" aria-label="{escape(caption)}"', 1)


def _sweep(sweep: Sweep, embed: FigureEmbedder) -> dict[str, Any]:
    models = dict.fromkeys(str(job.summary["model"].get("name")) for job in sweep.ended if job.summary)
    return {
        "title": f"Sweep: {sweep.name}",
        "facts": {
            "model": ", ".join(models),
            "jobs": f"{len(sweep.ended)} of {len(sweep.jobs)} finished",
            "best": f"job {sweep.ended[0].name}: {sweep.setting(sweep.ended[0])}",
            "losses": CAPTION,
        },
        "tables": list(grids(sweep).items()),
        "figures": [embed(figure, caption) for caption, figure in sweep_figures(sweep).items()],
    }


def _section(
    title: str,
    runs: Sequence[RunFolder],
    evaluations: Sequence[Mapping[str, Any]],
    embed: FigureEmbedder,
    reference: str | None,
) -> dict[str, Any]:
    model = runs[0].model
    patterns: dict[str, Any] = {}
    for run in runs:
        patterns |= {free_name(name, pattern, patterns): pattern for name, pattern in run.patterns.items()}
    gated = f"{model.get('layers')} layers, {model.get('gated_layers')} of them with gates, "
    return {
        "title": title,
        "facts": {
            "model": model.get("id"),
            "revision": model.get("revision"),
            "weights": model.get("source"),
            "shape": gated + f"{model.get('kv_heads')} KV heads each, {model.get('heads')} query heads",
        },
        "evaluations": [
            _evaluation(results, embed, reference if reference in _heads(results) else None) for results in evaluations
        ],
        "patterns": _patterns(patterns, embed),
        "trainings": [_training(run, embed) for run in runs if run.results is None],
    }


def _heads(results: Mapping[str, Any]) -> list[str]:
    return list(dict.fromkeys(map(contender_of, results["patterns"])))


def _evaluation(results: Mapping[str, Any], embed: FigureEmbedder, reference: str | None) -> dict[str, Any]:
    rows = frame(results)
    embed.announce("resampling")
    grid, middle_budget = contender_grid(rows), middle(rows)
    budgets = sorted(budgets_of(rows), key=lambda budget: budget != middle_budget)
    template = "with the chat template" if results.get("chat_template") else "without a chat template"
    return {
        "title": f"Evaluation: {results.get('split')} split, seed {results.get('seed')}, {template}",
        "facts": {
            "asked": f"{rows.groupby(QUESTION).ngroups} questions on {rows.groupby(SAMPLE).ngroups} contexts",
            "tasks": ", ".join(rows["task"].unique()),
            "lengths": ", ".join(f"{length:,}" for length in sorted(rows["length"].unique())) + " tokens",
            "computed in": results["model"].get("dtype"),
            **({"weights in": weights} if (weights := results["model"].get("weights")) else {}),
            "versions": _comma_separated(results["versions"]),
        },
        "grid": grid,
        "figures": [
            embed(figure, _caption(name)) for name, figure in figures(dict(results) | {"patterns": {}}).items()
        ],
        "leaderboards": leaderboards(results) | paired_grids(results, reference),
        "tables": [
            *of_generated(rows).items(),
            *(
                (f"{REPORTED[metric].label}, {budget.in_words}", task_grid(rows, metric, budget))
                for budget in budgets
                for metric in (headline(rows), "rise")
            ),
        ],
        "answers": _answers(rows, middle_budget),
        "notes": {
            name_of(contender["kind"], contender_of(contender["heads"])): contender["note"]  # the same for all seeds
            for contender in results["contenders"]
            if contender.get("note")
        },
        "settings": json.dumps(results["all_settings"], indent=1),
    }


def _caption(name: str) -> str:
    """The caption of a figure of `duo_id.report.figures.figures`, by its name there."""
    start, text = next((start, text) for start, text in CAPTIONS.items() if name.startswith(start))
    return text.format(task=name.removeprefix(start))


def _answers(rows: pd.DataFrame, budget: Budget | None) -> Grid | None:
    """The answers of full attention and the contenders of one budget to the first question of each task."""
    generated = rows[rows["text"].notna() & ((rows["kind"] == "full") | (rows["budget"] == budget))]
    lines = []
    for task, of_task in generated.groupby("task", sort=False):
        order = ["length", "index", "question"]
        first = of_task.sort_values(order, kind="stable").iloc[0]
        answers = of_task[(of_task[order] == first[order]).all(axis=1)].drop_duplicates(["kind", "heads"])
        for row in answers.head(ANSWERS).to_dict("records"):
            text, mark = str(row["text"]), "right" if row["exact"] == 1 else "wrong"
            verdict = Cell(f"{mark}, {REPORTED['score'].text(row['score'])}%", row["score"], look=mark)
            excerpt = Cell(text[:ANSWER] + "…" * (len(text) > ANSWER), look="answer")
            lines.append([Cell(str(task)), Cell(name_of(row["kind"], row["heads"])), verdict, excerpt])
    return Grid(["task", "heads", "judged", "generated answer"], {"": lines}) if lines else None


def _patterns(contents: Mapping[str, Any], embed: FigureEmbedder) -> list[PageFigure]:
    patterns = average_over_seeds(contents)
    embedded = []
    for shape in sorted({tuple(pattern.scores.shape) for pattern in patterns.values()}):
        group = {name: pattern for name, pattern in patterns.items() if tuple(pattern.scores.shape) == shape}
        windows = sorted({f"sink {pattern.sink_size}, recent {pattern.recent_size}" for pattern in group.values()})
        embedded.append(embed(plot_patterns(group), f"Scores of the KV heads. Windows: {'; '.join(windows)}."))
        if len(group) > 1:
            caption = (
                "Agreement between patterns: Spearman's correlation of all scores, and the retrieval heads shared by "
                "two patterns as a fraction of those in either."
            )
            embedded.append(embed(plot_agreement(group, [0.25, 0.5, 0.75]), caption))
    return embedded


def _training(run: RunFolder, embed: FigureEmbedder) -> dict[str, Any]:
    summary, seconds = run.summary, run.summary.get("seconds")
    scored: dict[tuple[str, float], list[dict[str, Any]]] = {}
    for row in summary.get("results") or []:
        scored.setdefault((row["heads"], row["sparsity"]), []).append(row)
    lines = []
    for (heads, sparsity), rows in sorted(scored.items(), key=lambda line: line[0][1]):
        metrics = {"loss": "answer_loss", "accuracy": "token_accuracy", "exact": "exact_answers"}
        means = {name: _mean([row.get(key) for row in rows]) for name, key in metrics.items()}
        cells = [Cell(REPORTED[name].text(value), value) for name, value in means.items()]
        name = name_of("full" if heads == "full" else "", heads, len(rows))
        lines.append([Cell(name), Cell(f"{100 * sparsity:.4g}", sparsity), *cells])
    headings = ["heads", "stream\n%", "answer\nloss", "token\naccuracy %", "exact\nanswers %"]
    return {
        "title": f"Training: {run.name}",
        "facts": {
            "steps": summary.get("steps"),
            "seed": summary.get("seed"),
            "mean gate": f"{summary['mean_gate']:.3f}" if "mean_gate" in summary else None,
            "seconds": f"{seconds:.0f}"
            if isinstance(seconds, float | int)
            else _comma_separated({name: f"{value:.0f}" for name, value in (seconds or {}).items()}),
            "versions": _comma_separated(summary.get("versions") or {}),
        },
        "grid": Grid(headings, {"": lines}) if lines else None,
        "figures": _training_curves(run, embed),
        "settings": json.dumps(summary.get("settings"), indent=1),
    }


def _mean(values: Sequence[float | None]) -> float:
    """The mean, or NaN if any value is missing: earlier versions did not measure all."""
    measured = [value for value in values if value is not None]
    return sum(measured) / len(measured) if len(measured) == len(values) else float("nan")


def _training_curves(run: RunFolder, embed: FigureEmbedder) -> list[PageFigure]:
    """The curves of training, if there are any: methods without training log only scores by layer."""
    if run.metrics is None or not any(column.startswith(("train/", "val/")) for column in run.metrics):
        return []
    return [embed(plot_training(run.metrics), "Training curves.")]


def _comma_separated(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())
