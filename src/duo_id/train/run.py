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
from duo_id.common.errors import check
from duo_id.common.figures import save_figure
from duo_id.common.files import write_text
from duo_id.common.integrity import sealed
from duo_id.common.record import (
    check_unchanged,
    differences,
    in_groups,
    keep_settings,
    read_settings,
    recorded_settings,
)
from duo_id.distributed.launch import launch
from duo_id.distributed.ranks import Ranks
from duo_id.methods.search import ORDER
from duo_id.methods.settings import GateSettings
from duo_id.models.gated_model import GatedModel
from duo_id.models.language_model import LanguageModel
from duo_id.models.loading import dtype_of, load_model, meta_model
from duo_id.patterns.agreement import agreement_table
from duo_id.patterns.files import HEADS, load_pattern, save_pattern
from duo_id.patterns.pattern import HeadPattern, average
from duo_id.patterns.plots import plot_gates
from duo_id.step.devices import shared_step
from duo_id.train.checkpoints import CHECKPOINT
from duo_id.train.comparison import check_window, compare, found_loss, results_table
from duo_id.train.fit_gates import TrainRun, sample_module
from duo_id.train.identify import identify
from duo_id.train.plots import plot_training, read_metrics
from duo_id.train.settings import TrainSettings
from duo_id.train.tracking import log_config, log_gates, log_heads, tracked

Earlier = tuple[dict[str, Any], dict[str, Any]]  # settings, and what was there before them by override
STEPS = ("trainer.max_steps",)
CHANGEABLE = (
    "comparison",
    "sparsity",
    "repeats",
    "model.name",
    "data.num_workers",
)  # done anew, or without a trace in heads
MEANTIME = ("step", "trainer")  # what a resumed run may change for the steps to come, which provenance tells
NOT_RECORDED = (
    "logger",
    "resume",
    "checkpoint_seconds",
)  # settings that say nothing about what was found, only about a disk


def train(settings: TrainSettings, folder: Path, in_sweep: bool = False) -> dict[str, Any]:
    """Find heads by the chosen method, export them as a head pattern and compare its masks.

    Args:
        settings: what to identify, on which samples, how.
        folder: the run folder; `heads/`, `figures/` and `summary.json` are written to it.
        in_sweep: score the found masks on validation samples too, for a sweep to choose by; the test samples of the
            table would flatter what was chosen on them.

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
    cli.console.quiet = not ranks.first
    folder = Path(ranks.broadcast(str(folder)))
    asked, earlier = plain(settings), _check_resumed(settings, folder)
    used = _used(earlier, asked, folder)
    before = _before(earlier, asked | used)
    with ranks.one_line_errors():
        if ranks.world > 1:
            settings = _shared(settings, device, ranks, folder)
        model = load_model(settings.model, device, settings.seed, ranks)
        with attached(model.model, settings.step.backends, ranks.group) as layers:
            accepted = partial(keep_settings, folder, asked | used, before) if ranks.first else lambda: None
            gated_model = GatedModel(model, layers, method.window, settings.step.backends)
            run = TrainRun(
                settings=settings,
                seed=settings.seed,
                folder=folder,
                resume=bool(settings.resume),
                step=settings.step,
                console=cli.console,
                accepted=accepted,
            )
            samples = sample_module(model, settings, settings.seed)
            test = samples.samples("test", settings.comparison.samples)
            check_window(test, method.sink_size, method.recent_size)
            validation = samples.samples("validation", settings.comparison.samples) if in_sweep else []
            found = {
                "model": model.describe(layers),
                "settings": {key: value for key, value in (plain(settings) | used).items() if key not in NOT_RECORDED},
                "versions": cli.versions(),
            }
            if before:
                found["before"] = before
            loaded = time.perf_counter()
            patterns = _identify_repeatedly(gated_model, run, found)
            identified = time.perf_counter()
        pattern = average(list(patterns.values()))
        sparsities = _sparsities(settings, pattern)
        if ranks.first and len(patterns) > 1:
            save_pattern(pattern, folder / "heads", sparsities)
        results = compare(
            model, pattern, test, sparsities, settings.comparison.random_masks, settings.seed, settings.step.backends
        )
        chosen_by = {}
        if in_sweep:
            loss = found_loss(model, pattern, validation, sparsities, settings.step.backends)
            chosen_by = {"validation_loss": loss}
        done = time.perf_counter()
        told: dict[str, Any] = {
            "seconds": {"load": loaded - began, "identify": identified - loaded, "compare": done - identified},
            "results": [result.summary() for result in results],
        }
        if pattern.holds_gates:
            told["mean_gate"] = float(pattern.scores[list(pattern.gated_layers)].mean())
        summary = pattern.provenance | told | chosen_by
        if ranks.first:
            write_text(folder / "summary.json", json.dumps(sealed(summary), indent=1))
            save_figure(plot_gates(pattern, title=f"Heads of {model.name}"), folder / "figures" / "gates.png")
        if len(patterns) > 1:
            cli.console.print(agreement_table(patterns, settings.sparsity))
        cli.console.print(results_table(results, f"{model.name}: {len(test)} held-out samples"))
        return summary


def _check_resumed(settings: TrainSettings, folder: Path) -> Earlier:
    """Refuse to go on with a run under settings that what it has found so far was not found with.

    Returns:
        the settings of the earlier part, and those that parts before it had instead; nothing of either if there is
        nothing to go on from, for then everything is done under today's.
    """
    if not settings.resume:
        return {}, {}
    (earlier, before), now = read_settings(folder), plain(settings)
    done = (folder / "heads" / HEADS).is_file()
    begun = [place for place in (folder, *sorted(folder.glob("seed-*"))) if _begun(place)]
    if done or begun:
        method, repeats = earlier.get("method"), earlier.get("repeats", settings.repeats)
        name = method.get("name") if isinstance(method, dict) else None
        refused = f"resume={settings.resume} is a run of"
        check(
            name in (None, settings.method.name),
            f"method={settings.method.name}: {refused} method={name}; leave out resume",
        )
        check(
            (repeats == 1) == (settings.repeats == 1),
            f"repeats={settings.repeats}: {refused} repeats={repeats}, whose heads would be replaced; leave out resume",
        )
    if settings.repeats > 1:
        for seed in range(settings.seed, settings.seed + settings.repeats):
            if ((place := folder / f"seed-{seed}") / "heads" / HEADS).is_file():
                _found_before(place, settings)
    if not begun:
        return {}, {}
    free = [*NOT_RECORDED, *CHANGEABLE, *MEANTIME, "method.prior_weight", "method.batch_tokens"]
    if not any((place / "prior" / ORDER).is_file() for place in begun) or not isinstance(now["method"]["prior"], dict):
        free.append("method.prior")  # which is found, or read, once more
    found = {key: values for key, values in differences(earlier, now).items() if not in_groups(key, free)}
    check_unchanged(
        found, f"resume={settings.resume}: it was made", "and what it has found so far holds for that alone"
    )
    return earlier, before


def _begun(folder: Path) -> bool:
    """Whether a run folder, or that of a seed, holds something that a resumed run would not do again."""
    orders = [folder / name / ORDER for name in (".", "prior", "start")]
    seed = folder.name.startswith("seed-") and (folder / "heads" / HEADS).is_file()
    return seed or any(path.is_file() for path in (folder / CHECKPOINT, *orders))


def _used(earlier: Earlier, now: dict[str, Any], folder: Path) -> dict[str, Any]:
    """What a finished run had in place of today's `MEANTIME`, under which no step will be taken."""
    settings = earlier[0]
    ended = (folder / "heads" / HEADS).is_file() and settings.get("trainer", {}).get("max_steps") == now["trainer"][
        "max_steps"
    ]
    return {group: settings[group] for group in MEANTIME if ended and group in settings}


def _before(earlier: Earlier, now: dict[str, Any]) -> dict[str, Any]:
    """What the first part of a resumed run had instead of today's settings, by override."""
    settings, before = earlier
    found = {key: old for key, (old, _) in differences(settings, now).items() if in_groups(key, MEANTIME)}
    return found | before if settings else {}


def _shared(settings: TrainSettings, device: torch.device, ranks: Ranks, folder: Path) -> TrainSettings:
    """Show what the first step will need of each device, and how a run that is cut off goes on.

    Returns:
        the settings, with step.memory=outputs or least where memory does not let layers keep everything.

    Raises:
        UserError: a device has not that much, or the settings are for one device alone.
    """
    model = meta_model(settings.model, dtype_of(settings.model.dtype, device))
    tokens = settings.data.length_max or model.config.get_text_config().max_position_embeddings
    teacher_outputs = isinstance(settings.method, GateSettings) and BLENDS[settings.method.blend].needs_teacher
    step, plan = shared_step(model, settings.step, ranks, device, tokens, settings.data.batch_size, teacher_outputs)
    cli.say(str(plan))
    cli.say(f"if a process is lost: {cli.resume_command('train', folder)}")
    return replace(settings, step=step)


def _identify_repeatedly(gated_model: GatedModel, run: TrainRun, found: dict[str, Any]) -> dict[str, HeadPattern]:
    """A pattern for each seed, by its name; several have a folder each, where a resumed run finds what is done.

    Args:
        gated_model: the model.
        run: of the first seed.
        found: provenance that all share.
    """
    settings, patterns = run.settings, {}
    for seed in range(settings.seed, settings.seed + settings.repeats):
        folder = run.folder if settings.repeats == 1 else run.folder / f"seed-{seed}"
        if settings.repeats > 1 and (folder / "heads" / HEADS).is_file():
            patterns[f"seed {seed}"] = _found_before(folder, settings)
            _draw_training(gated_model.model, settings, folder, again=False)
            continue
        with tracked(settings.logger if gated_model.model.ranks.first else {}, folder) as loggers:
            known = found | {"seed": seed}
            accepted = partial(_accepted, run, loggers, known)
            began = time.perf_counter()
            of_seed = replace(run, folder=folder, seed=seed, accepted=accepted, loggers=loggers)
            pattern = identify(gated_model, settings.method, of_seed)
            told = dict(pattern.provenance)
            took = {"seconds": time.perf_counter() - began + told.pop("seconds_before", 0.0)}
            pattern = replace(pattern, provenance=known | took | told)
            sparsities = _sparsities(settings, pattern)
            if gated_model.model.ranks.first:
                save_pattern(pattern, folder / "heads", sparsities)
            if not isinstance(settings.method, GateSettings):
                log_gates(loggers, pattern, sparsities, step=0)
            log_heads(loggers, folder / "heads")
        _draw_training(gated_model.model, settings, folder)
        patterns[f"seed {seed}"] = pattern
    return patterns


def _draw_training(model: LanguageModel, settings: TrainSettings, folder: Path, again: bool = True) -> None:
    """The figure of how gates were trained in a folder; not `again`: only if that was cut off before it."""
    figure, trained = folder / "figures" / "training.png", isinstance(settings.method, GateSettings)
    if model.ranks.first and trained and "csv" in settings.logger and (again or not figure.is_file()):
        save_figure(plot_training(read_metrics(folder), title=f"Training gates of {model.name}"), figure)


def _found_before(folder: Path, settings: TrainSettings) -> HeadPattern:
    """The pattern of a seed that an earlier part of the run has found, in the way in which others are being found."""
    pattern = load_pattern(folder)
    found = differences(recorded_settings(pattern.provenance), plain(settings))
    found = {
        key: values
        for key, values in found.items()
        if key in STEPS or not in_groups(key, [*NOT_RECORDED, *CHANGEABLE, *MEANTIME])
    }
    told = f"resume={settings.resume}: {folder.name} was found"
    check_unchanged(found, told, "and a mean of both would mean nothing")
    return pattern


def _accepted(run: TrainRun, loggers: Sequence[Logger], known: dict[str, Any]) -> None:
    run.accepted()
    log_config(loggers, known)


def _sparsities(settings: TrainSettings, pattern: HeadPattern) -> list[float]:
    """Of the masks that are exported: a pattern that was refined for one sparsity has that one alone."""
    budget = pattern.provenance.get("budget")
    return settings.sparsity if budget is None else [budget]
