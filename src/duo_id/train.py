"""`python -m duo_id.train`: identify a model's retrieval heads by training gates, and show how good they are."""

import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning
import torch
from omegaconf import DictConfig

from duo_id import app
from duo_id.attention.gated import attached
from duo_id.config import TrainSettings, plain, require
from duo_id.evaluation.agreement import agreement_table
from duo_id.evaluation.comparison import check_window, compare, results_table
from duo_id.files import write_text
from duo_id.formats import HEADS, load_pattern, save_pattern
from duo_id.identification import Run, average, identify
from duo_id.methods import GateSettings, train_settings
from duo_id.models import dtype_of, load_model, meta_model
from duo_id.patterns import HeadPattern
from duo_id.plan import Shape, memory_plan
from duo_id.plots import plot_gates, plot_training, read_metrics, save_figure
from duo_id.ranks import Ranks, launch

UNTOLD = ("logger", "resume", "checkpoint_seconds")  # settings that say nothing about what was found, only about a disk


def train(settings: TrainSettings, folder: Path, accepted: Callable[[], None] = lambda: None) -> dict[str, Any]:
    """Train the gates, export them as a head pattern and compare its masks.

    Args:
        settings: what to identify, on which samples, how.
        folder: the run folder; `heads/`, `figures/` and `summary.json` are written to it.
        accepted: called once the settings, and those of a resumed run, have proved to work.

    Returns:
        the summary that is also written.

    Raises:
        UserError: something in the settings cannot work; the message names the override.
        KeyboardInterrupt: after Ctrl-C, once a checkpoint is written.
    """
    began = time.perf_counter()
    lightning.seed_everything(settings.seed, workers=True, verbose=False)
    method = settings.method
    device, ranks = launch(
        settings.trainer, settings.step.sequence_parallel, settings.step.shard, settings.data.batch_size
    )
    require(ranks.world == 1 or not settings.step.cuda_graphs, "step.cuda_graphs=true works on 1 device alone")
    app.console.quiet = not ranks.first
    folder = Path(ranks.agreed(str(folder)))
    with ranks.watched():
        if ranks.world > 1:
            _announce(settings, device, ranks, folder)
        model = load_model(settings.model, device, settings.seed, ranks)
        with attached(model.model, settings.step.backends, ranks.group) as layers:
            run = Run(settings, model, layers, folder, settings.seed, accepted, app.console)
            test = run.data().samples("test", settings.comparison.samples)
            check_window(test, method.sink_size, method.recent_size)
            found = {
                "model": model.describe(layers),
                "settings": {key: value for key, value in plain(settings).items() if key not in UNTOLD},
                "versions": app.versions(),
            }
            loaded = time.perf_counter()
            patterns = _identify_repeatedly(run, found)
            identified = time.perf_counter()
        pattern = average(list(patterns.values()))
        if len(patterns) > 1:
            app.console.print(agreement_table(patterns, settings.sparsity))
        budget = pattern.provenance.get("budget")
        sparsities = settings.sparsity if budget is None else [budget]
        if ranks.first:
            save_pattern(pattern, folder / "heads", sparsities)
            save_figure(plot_gates(pattern, title=f"Heads of {model.name}"), folder / "figures" / "gates.png")
        results = compare(
            model, pattern, test, sparsities, settings.comparison.random_masks, settings.seed, settings.step.backends
        )
        done = time.perf_counter()
        app.console.print(results_table(results, f"{model.name}: {len(test)} held-out samples"))
        summary = pattern.provenance | {
            "mean_gate": float(pattern.scores[list(pattern.gated_layers)].mean()),
            "seconds": {"load": loaded - began, "identify": identified - loaded, "compare": done - identified},
            "results": [result.summary() for result in results],
        }
        if ranks.first:
            write_text(folder / "summary.json", json.dumps(summary, indent=1))
        return summary


def _announce(settings: TrainSettings, device: torch.device, ranks: Ranks, folder: Path) -> None:
    """Show what the first step will need of each device, and how a run that is cut off goes on.

    Raises:
        UserError: a device has not that much.
    """
    model = meta_model(settings.model, dtype_of(settings.model.dtype, device))
    shape = Shape(
        tokens=settings.data.length_max or model.config.get_text_config().max_position_embeddings,
        samples=settings.data.batch_size,
        data=ranks.data,
        sequence=ranks.sequence,
        sharded=ranks.sharded,
        recompute=settings.step.recompute,
        teacher_outputs=isinstance(settings.method, GateSettings) and settings.method.blend == "teacher",
    )
    plan = memory_plan(model, shape)
    title = f"{settings.model.name}, {shape.tokens:,} tokens, {ranks.data} x {ranks.sequence} devices"
    app.console.print(plan.table(title))
    app.console.print(f"if a process is lost: python -m duo_id.train resume={folder}", soft_wrap=True)
    if device.type == "cuda":
        plan.check(torch.cuda.get_device_properties(device).total_memory)


def _identify_repeatedly(run: Run, found: dict[str, Any]) -> dict[str, HeadPattern]:
    """A pattern for each seed, by its name; several have a folder each, where a resumed run finds what is done.

    Args:
        run: of the first seed.
        found: provenance that all share.
    """
    settings, patterns = run.settings, {}
    for seed in range(settings.seed, settings.seed + settings.repeats):
        folder = run.folder if settings.repeats == 1 else run.folder / f"seed-{seed}"
        if settings.repeats > 1 and (folder / "heads" / HEADS).is_file():
            patterns[f"seed {seed}"] = load_pattern(folder)
            continue
        pattern = identify(settings.method, replace(run, folder=folder, seed=seed))
        pattern = replace(pattern, provenance=found | {"seed": seed} | pattern.provenance)
        if settings.repeats > 1 and run.model.ranks.first:
            save_pattern(pattern, folder / "heads", settings.sparsity)
        if isinstance(settings.method, GateSettings) and "csv" in settings.logger and run.model.ranks.first:
            curve = plot_training(read_metrics(folder), title=f"Training gates of {run.model.name}")
            save_figure(curve, folder / "figures" / "training.png")
        patterns[f"seed {seed}"] = pattern
    return patterns


def main(config: DictConfig) -> float:
    """Run the command; returns what a sweep minimises, the found masks' mean answer loss on held-out samples."""
    config, folder, overrides = app.start_run(config)
    try:
        summary = train(train_settings(config), folder, lambda: app.keep_overrides(folder, overrides))
    except (KeyboardInterrupt, OSError):
        if (folder / app.OVERRIDES).is_file():
            app.console.print(f"stopped; to go on: python -m duo_id.train resume={folder}", soft_wrap=True)
        raise
    app.console.print(f"heads: {folder / 'heads'}   figures: {folder / 'figures'}", soft_wrap=True)
    losses = [result["answer_loss"] for result in summary["results"] if result["heads"] == "found"]
    return sum(losses) / len(losses)


if __name__ == "__main__":
    app.run("train", main)
