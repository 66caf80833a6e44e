"""Train gates or score heads, export a head pattern, and show how good its masks are."""

import json
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.loggers import Logger

from duo_id.attention.blends import BLENDS
from duo_id.attention.interface import attached
from duo_id.common import cli
from duo_id.common.config import plain
from duo_id.common.figures import save_figure
from duo_id.common.files import write_text
from duo_id.common.integrity import sealed
from duo_id.common.record import keep_settings
from duo_id.common.tables import print_tables
from duo_id.data.haystack import text_versions, with_digest
from duo_id.data.writing import with_written
from duo_id.distributed.launch import launch
from duo_id.distributed.ranks import Ranks
from duo_id.methods.settings import GateSettings
from duo_id.models.gated_model import GatedModel
from duo_id.models.language_model import LanguageModel
from duo_id.models.loading import load_model, sized_model
from duo_id.patterns.agreement import agreement_table
from duo_id.patterns.combining import average
from duo_id.patterns.pattern import HeadPattern
from duo_id.patterns.saved import save_pattern
from duo_id.patterns.sources import HEADS
from duo_id.step.devices import shared_step
from duo_id.train.comparison import check_window, compare, pattern_loss, results_table, spans_like
from duo_id.train.fit_gates import TrainRun, sample_module
from duo_id.train.identify import identify
from duo_id.train.plots import plot_training, read_metrics
from duo_id.train.progress import introduction
from duo_id.train.resumed import NOT_RECORDED, check_resumed, finished_settings, load_seed_pattern, replaced_settings
from duo_id.train.settings import TrainSettings
from duo_id.train.tracking import log_config, log_gates, log_heads, run_loggers


def train(settings: TrainSettings, folder: Path, in_sweep: bool = False) -> dict[str, Any]:
    """Find heads by the chosen method, export them as a head pattern and compare its masks.

    Args:
        settings: of the run.
        folder: the run folder; `heads/`, `figures/` and `summary.json` are written to it.
        in_sweep: also score the pattern's masks on validation samples, for a sweep to choose by; selecting on the test
            samples would bias the table.

    Returns:
        the summary, as written to `summary.json`.

    Raises:
        UserError: something in the settings cannot work; the message names the override.
        KeyboardInterrupt: after Ctrl-C, once a checkpoint is written.
    """
    started = time.perf_counter()
    lightning.seed_everything(settings.seed, workers=True, verbose=False)
    method = settings.method
    device, ranks = launch(
        settings.trainer, settings.step.sequence_parallel, settings.step.shard, settings.data.batch_size
    )
    cli.console.quiet = not ranks.first
    folder = Path(ranks.broadcast(str(folder)))
    settings = replace(settings, data=with_digest(settings.data))
    requested, earlier = plain(settings), check_resumed(settings, folder)
    kept = finished_settings(earlier, requested, folder)
    replaced = replaced_settings(earlier, requested | kept)
    with ranks.one_line_errors():
        if ranks.world > 1:
            settings = _plan_shared_step(settings, device, ranks, folder)
        model = load_model(settings.model, device, settings.seed, ranks)
        data = with_written(settings.data, model, cli.console, graph=settings.step.cuda_graphs is not False)
        settings = replace(settings, data=replace(settings.data, self_sha256=data.self_sha256))
        requested["data"] = plain(settings.data)
        with attached(model.model, settings.step.backends, ranks.group) as layers:
            on_accepted = partial(keep_settings, folder, requested | kept, replaced) if ranks.first else lambda: None
            gated_model = GatedModel(model, layers, method.window, settings.step.backends)
            for line in introduction(gated_model, settings, folder):
                cli.say(line)
            run = TrainRun(
                settings=replace(settings, data=data),
                seed=settings.seed,
                folder=folder,
                resume=bool(settings.resume),
                step=settings.step,
                console=cli.console,
                on_accepted=on_accepted,
            )
            samples = sample_module(model, run.settings, settings.seed)
            test = samples.samples("test", settings.comparison.samples)
            check_window(test, method.sink_size, method.recent_size)
            validation = samples.samples("validation", settings.comparison.samples) if in_sweep else []
            provenance = {
                "model": model.describe(layers),
                "settings": {key: value for key, value in (plain(settings) | kept).items() if key not in NOT_RECORDED},
                "versions": cli.versions() | text_versions(settings.data.haystack),
            }
            if replaced:
                provenance["before"] = replaced
            loaded = time.perf_counter()
            patterns = _identify_repeatedly(gated_model, run, provenance)
            identified = time.perf_counter()
        pattern = average(list(patterns.values()))
        sparsities = _sparsities(settings, pattern)
        if ranks.first and len(patterns) > 1:
            save_pattern(pattern, folder / "heads", sparsities)
        random_masks, backends = settings.comparison.random_masks, settings.step.backends
        results = compare(model, pattern, test, sparsities, random_masks, settings.seed, backends, cli.console)
        validation_summary = {}
        if in_sweep:
            loss = pattern_loss(model, pattern, validation, sparsities, settings.step.backends)
            validation_summary = {"validation_loss": loss}
        compared = time.perf_counter()
        measured: dict[str, Any] = {
            "seconds": {"load": loaded - started, "identify": identified - loaded, "compare": compared - identified},
            "results": [result.summary() for result in results],
        }
        if pattern.holds_gates:
            measured["mean_gate"] = float(pattern.scores[list(pattern.gated_layers)].mean())
        summary = pattern.provenance | measured | validation_summary
        if ranks.first:
            write_text(folder / "summary.json", json.dumps(sealed(summary), indent=1))
            save_figure(pattern.plot(title=f"Heads of {model.name}"), folder / "figures" / "gates.png")
            length = max(len(sample["input_ids"]) for sample in test)
            if (spans := spans_like(pattern, pattern.binarize(sparsity=0.5), length)) is not None:
                title = f"Spans of {model.name} with the bytes of half of the heads streaming at {length:,} tokens"
                save_figure(spans.plot(title=title), folder / "figures" / "spans.png")
        if len(patterns) > 1:
            print_tables(cli.console, agreement_table(patterns, settings.sparsity))
        print_tables(cli.console, results_table(results, f"{model.name}: {len(test)} held-out samples"))
        return summary


def _plan_shared_step(settings: TrainSettings, device: torch.device, ranks: Ranks, folder: Path) -> TrainSettings:
    """Show the memory plan of each device, and the command that resumes the run if a process is lost.

    Returns:
        the settings, with step.memory=outputs or least where layers cannot keep everything.

    Raises:
        UserError: a device has too little memory, or the settings only work on a single device.
    """
    model = sized_model(settings.model, device)
    tokens = settings.data.length_max or model.config.get_text_config().max_position_embeddings
    teacher_outputs = isinstance(settings.method, GateSettings) and BLENDS[settings.method.blend].needs_teacher
    step, plan = shared_step(model, settings.step, ranks, device, tokens, settings.data.batch_size, teacher_outputs)
    cli.say(str(plan))
    cli.say(f"if a process is lost: {cli.resume_command('train', folder)}")
    return replace(settings, step=step)


def _identify_repeatedly(gated_model: GatedModel, run: TrainRun, provenance: dict[str, Any]) -> dict[str, HeadPattern]:
    """The pattern of each seed, by name; with several seeds each has a folder, which a resumed run skips if finished.

    Args:
        gated_model: the model.
        run: of the first seed.
        provenance: shared by all seeds.
    """
    settings, patterns = run.settings, {}
    for seed in range(settings.seed, settings.seed + settings.repeats):
        folder = run.folder if settings.repeats == 1 else run.folder / f"seed-{seed}"
        if settings.repeats > 1 and (folder / "heads" / HEADS).is_file():
            patterns[f"seed {seed}"] = load_seed_pattern(folder, settings)
            _draw_training(gated_model.model, settings, folder, redraw=False)
            continue
        with run_loggers(settings.logger if gated_model.model.ranks.first else {}, folder) as loggers:
            seed_provenance = provenance | {"seed": seed}
            on_accepted = partial(_log_accepted, run, loggers, seed_provenance)
            started = time.perf_counter()
            seed_run = replace(run, folder=folder, seed=seed, on_accepted=on_accepted, loggers=loggers)
            pattern = identify(gated_model, settings.method, seed_run)
            method_provenance = dict(pattern.provenance)
            timing = {"seconds": time.perf_counter() - started + method_provenance.pop("seconds_before", 0.0)}
            pattern = replace(pattern, provenance=seed_provenance | timing | method_provenance)
            sparsities = _sparsities(settings, pattern)
            if gated_model.model.ranks.first:
                save_pattern(pattern, folder / "heads", sparsities)
            if not isinstance(settings.method, GateSettings):
                log_gates(loggers, pattern, sparsities, step=0)
            log_heads(loggers, folder / "heads")
        _draw_training(gated_model.model, settings, folder)
        patterns[f"seed {seed}"] = pattern
    return patterns


def _draw_training(model: LanguageModel, settings: TrainSettings, folder: Path, redraw: bool = True) -> None:
    """Plot the training of gates in a folder; without `redraw`, only if there is no figure yet."""
    figure, trained = folder / "figures" / "training.png", isinstance(settings.method, GateSettings)
    if model.ranks.first and trained and "csv" in settings.logger and (redraw or not figure.is_file()):
        save_figure(plot_training(read_metrics(folder), title=f"Training gates of {model.name}"), figure)


def _log_accepted(run: TrainRun, loggers: Sequence[Logger], provenance: dict[str, Any]) -> None:
    run.on_accepted()
    log_config(loggers, provenance)


def _sparsities(settings: TrainSettings, pattern: HeadPattern) -> list[float]:
    """Sparsities of the exported masks: only its own for a pattern that was refined for one sparsity."""
    budget = pattern.provenance.get("budget")
    return settings.sparsity if budget is None else [budget]
