"""One HTML page for any set of runs: tables, figures and answers, with nothing to load from elsewhere."""

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
from duo_id.report.figures import figures, sparsities_of
from duo_id.report.leaderboard import averaged, leaderboards
from duo_id.report.paired import paired_grids
from duo_id.report.rows import QUESTION, SAMPLE
from duo_id.report.runs import RunFolder, free_name, merge
from duo_id.report.summary import REPORTED, contender_of, frame, name_of
from duo_id.report.sweep_figures import sweep_figures
from duo_id.report.sweeps import CAPTION, Sweep, grids
from duo_id.report.tables import Cell, Grid, contender_grid, headline, middle, task_grid
from duo_id.train.plots import plot_training

LARGEST_SVG = 200_000  # characters; a larger figure becomes a PNG
ANSWER, ANSWERS = 60, 8  # characters of an answer that are shown; contenders of a task
CAPTIONS = {  # what a figure shows, by the beginning of its name
    "budget-score": "Score of the generated answers over the part of the KV cache that is kept. Bands: 95% intervals.",
    "budget-accuracy": "Token accuracy of the right answers over the part of the KV cache that is kept. "
    "Bands: 95% intervals.",
    "budget-rise": "How far the answer loss rises above full attention's, over the part of the KV cache that is kept. "
    "Bands: 95% intervals.",
    "cost": "Rise in answer loss over the time that finding the heads took. Thin lines: 95% intervals.",
    "tasks": "Each task relative to full attention (dashed), by the part of the KV heads that stream. "
    "Thin lines: 95% intervals.",
    "depths": "Score by the length of the context and the depth of the needle. KV: the part of the cache that is kept.",
    "position": "Loss of plain text by its place in the context, all lengths together.",
}
Picture = dict[str, Any]


def report(
    runs: Sequence[RunFolder],
    shown: Callable[[str], None] = lambda text: None,
    sweeps: Sequence[Sweep] = (),
    reference: str | None = None,
) -> str:
    """The page: a section for each sweep, then for each model, with its evaluations, head patterns and training runs.

    Args:
        runs: to show; at least one, or a sweep.
        shown: told what is being worked on.
        sweeps: to show, each with a job that has come to its end.
        reference: the heads that others are compared with; None, and in evaluations that lack it: those that an
            evaluation names first.

    Raises:
        UserError: a run holds a broken head pattern, or something else than numbers where numbers belong, or none of
            the evaluations has the reference.
    """
    models: dict[tuple[str, ...], list[RunFolder]] = {}
    for run in runs:
        models.setdefault(tuple(str(run.model.get(key)) for key in ("name", "id", "revision")), []).append(run)
    merged = {model: merge([run.results for run in of_model if run.results]) for model, of_model in models.items()}
    known = list(
        dict.fromkeys(name for of_model in merged.values() for results in of_model for name in _heads(results))
    )
    if reference not in (None, *known):
        raise UserError(
            f"reference={reference}: there are no such heads here, choose among {', '.join(known) or 'none'}"
        )
    pictures = Pictures(shown)
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    sections = [_section(model[0], of_model, merged[model], pictures, reference) for model, of_model in models.items()]
    compared = [_sweep(sweep, pictures) for sweep in sweeps]
    page = environment.get_template("page.html.j2").render(sections=sections, sweeps=compared)
    return re.sub(r"[\x00-\x08\x0b-\x1f]", "\N{REPLACEMENT CHARACTER}", page)  # answers may hold anything


class Pictures:
    """Makes figures part of a page, each with ids of its own."""

    def __init__(self, shown: Callable[[str], None]) -> None:
        self.shown, self.count = shown, 0

    def __call__(self, figure: Figure, caption: str) -> Picture:
        """The figure with its caption: as SVG, or as PNG where that would be large."""
        self.count += 1
        self.shown(f"drawing figure {self.count}")
        width = round(96 * figure.get_figwidth())  # CSS has 96 pixels an inch
        settings: dict[Any, Any] = {"svg.fonttype": "none", "svg.hashsalt": f"figure {self.count}"}
        with mpl.rc_context(settings), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Glyph")  # the reader's fonts have more than ours
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
        """The SVG element alone, without ids that nothing refers to."""
        svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
        used, prefix = set(re.findall(r'(?:url\(#|href="#)([^")]+)', svg)), f"f{self.count}-"
        svg = re.sub(r' id="([^"]*)"', lambda found: f' id="{prefix}{found[1]}"' if found[1] in used else "", svg)
        svg = re.sub(r'(url\(#|href="#)', rf"\g<1>{prefix}", svg)
        return svg.replace("<svg", f'<svg role="img" aria-label="{escape(caption)}"', 1)


def _sweep(sweep: Sweep, picture: Pictures) -> dict[str, Any]:
    models = dict.fromkeys(str(job.summary["model"].get("name")) for job in sweep.ended if job.summary)
    return {
        "title": f"Sweep: {sweep.name}",
        "facts": {
            "model": ", ".join(models),
            "jobs": f"{len(sweep.ended)} of {len(sweep.jobs)} have come to their end",
            "best": f"job {sweep.ended[0].name}: {sweep.setting(sweep.ended[0])}",
            "losses": CAPTION,
        },
        "tables": list(grids(sweep).items()),
        "figures": [picture(figure, caption) for caption, figure in sweep_figures(sweep).items()],
    }


def _section(
    title: str,
    runs: Sequence[RunFolder],
    evaluations: Sequence[Mapping[str, Any]],
    picture: Pictures,
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
            _evaluation(results, picture, reference if reference in _heads(results) else None)
            for results in evaluations
        ],
        "patterns": _patterns(patterns, picture),
        "trainings": [_training(run, picture) for run in runs if run.results is None],
    }


def _heads(results: Mapping[str, Any]) -> list[str]:
    return list(dict.fromkeys(map(contender_of, results["patterns"])))


def _evaluation(results: Mapping[str, Any], picture: Pictures, reference: str | None) -> dict[str, Any]:
    rows = frame(results)
    picture.shown("resampling")
    grid, half = contender_grid(rows), middle(rows)
    sparsities = sorted(sparsities_of(rows), key=lambda sparsity: sparsity != half)
    shared = "with the chat template" if results.get("chat_template") else "without a chat template"
    return {
        "title": f"Evaluation: {results.get('split')} split, seed {results.get('seed')}, {shared}",
        "facts": {
            "asked": f"{rows.groupby(QUESTION).ngroups} questions on {rows.groupby(SAMPLE).ngroups} contexts",
            "tasks": ", ".join(rows["task"].unique()),
            "lengths": ", ".join(f"{length:,}" for length in sorted(rows["length"].unique())) + " tokens",
            "computed in": results["model"].get("dtype"),
            "versions": _listed(results["versions"]),
        },
        "grid": grid,
        "figures": [
            picture(figure, next(text for start, text in CAPTIONS.items() if name.startswith(start)))
            for name, figure in figures(dict(results) | {"patterns": {}}).items()
        ],
        "leaderboards": leaderboards(results) | paired_grids(results, reference),
        "tables": [
            (
                f"{REPORTED[metric].label}, {100 * sparsity:.4g}% of the KV heads stream",
                task_grid(rows, metric, sparsity),
            )
            for sparsity in sparsities
            for metric in (headline(rows), "rise")
        ],
        "answers": _answers(rows, half),
        "notes": {name_of(one["kind"], one["heads"]): one["note"] for one in results["contenders"] if one.get("note")},
        "settings": json.dumps(results["all_settings"], indent=1),
    }


def _answers(rows: pd.DataFrame, sparsity: float) -> Grid | None:
    """What full attention and contenders of one sparsity answered to the first question of each task."""
    given = rows[rows["text"].notna() & ((rows["kind"] == "full") | (rows["sparsity"] == sparsity))]
    lines = []
    for task, of_task in given.groupby("task", sort=False):
        order = ["length", "index", "question"]
        first = of_task.sort_values(order, kind="stable").iloc[0]
        same = of_task[(of_task[order] == first[order]).all(axis=1)].drop_duplicates(["kind", "heads"])
        for row in same.head(ANSWERS).to_dict("records"):
            text, mark = str(row["text"]), "right" if row["exact"] == 1 else "wrong"
            judged = Cell(f"{mark}, {REPORTED['score'].text(row['score'])}%", row["score"], look=mark)
            shown = Cell(text[:ANSWER] + "…" * (len(text) > ANSWER), look="answer")
            lines.append([Cell(str(task)), Cell(name_of(row["kind"], row["heads"])), judged, shown])
    return Grid(["task", "heads", "judged", "generated answer"], {"": lines}) if lines else None


def _patterns(contents: Mapping[str, Any], picture: Pictures) -> list[Picture]:
    patterns = averaged(contents)
    found = []
    for shape in sorted({tuple(pattern.scores.shape) for pattern in patterns.values()}):
        alike = {name: pattern for name, pattern in patterns.items() if tuple(pattern.scores.shape) == shape}
        windows = sorted({f"sink {one.sink_size}, recent {one.recent_size}" for one in alike.values()})
        found.append(picture(plot_patterns(alike), f"Scores of the KV heads. Windows: {'; '.join(windows)}."))
        if len(alike) > 1:
            caption = (
                "How far patterns agree: Spearman's correlation of all scores, and the retrieval heads that two share "
                "as a part of those that at least one of them has."
            )
            found.append(picture(plot_agreement(alike, [0.25, 0.5, 0.75]), caption))
    return found


def _training(run: RunFolder, picture: Pictures) -> dict[str, Any]:
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
            else _listed({name: f"{value:.0f}" for name, value in (seconds or {}).items()}),
            "versions": _listed(summary.get("versions") or {}),
        },
        "grid": Grid(headings, {"": lines}) if lines else None,
        "figures": _course(run, picture),
        "settings": json.dumps(summary.get("settings"), indent=1),
    }


def _mean(values: Sequence[float | None]) -> float:
    """Of values that were all measured, else NaN: earlier versions did not measure all."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if len(known) == len(values) else float("nan")


def _course(run: RunFolder, picture: Pictures) -> list[Picture]:
    """The curves of training; methods without training have logged the layers of what they found alone."""
    if run.metrics is None or not any(column.startswith(("train/", "val/")) for column in run.metrics):
        return []
    return [picture(plot_training(run.metrics), "The course of training.")]


def _listed(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())
