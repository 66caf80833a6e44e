"""Any method on any model: from settings to a head pattern, perhaps from several seeds."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback, LambdaCallback, ProgressBar, Timer
from lightning.pytorch.loggers import Logger
from rich.console import Console
from torch import Tensor

from duo_id.attention.layers import AttentionLayer
from duo_id.attention.window import Window
from duo_id.common.errors import UserError, check
from duo_id.common.mistakes import instantiate
from duo_id.common.stopping import stop
from duo_id.data.datamodule import SampleModule
from duo_id.data.samples import Sample
from duo_id.methods.gated_model import Subject
from duo_id.methods.random import random_scores
from duo_id.methods.registry import ORDER, mean_scores, search_scores
from duo_id.methods.settings import (
    METHODS,
    GateSettings,
    MethodSettings,
    SaliencySettings,
    ScoreSettings,
    SearchSettings,
    name_nested_override,
    nested_override,
)
from duo_id.models.language_model import LanguageModel
from duo_id.patterns.files import load_pattern
from duo_id.patterns.pattern import HeadPattern, mix_prior
from duo_id.step.objectives import make_objective
from duo_id.step.prepare import prepared
from duo_id.step.settings import StepSettings
from duo_id.train.checkpoints import CHECKPOINT, AtomicCheckpointIO, LastCheckpoint
from duo_id.train.gate_training import GateTraining
from duo_id.train.history import GateHistory
from duo_id.train.progress import TrainingBar
from duo_id.train.restoring import misfit, while_restoring
from duo_id.train.settings import TrainSettings
from duo_id.train.tracking import GateTracking


@dataclass(frozen=True)
class Run:
    """What every method works with.

    Attributes:
        settings: of the whole run.
        model: the language model, attached.
        layers: those that get scores.
        folder: where progress is kept.
        seed: of samples and of whatever else is drawn.
        accepted: called once the settings have proved to work.
        console: shows the progress.
        loggers: get what training logs.
    """

    settings: TrainSettings
    model: LanguageModel
    layers: Sequence[AttentionLayer]
    folder: Path
    seed: int
    accepted: Callable[[], None]
    console: Console
    loggers: Sequence[Logger] = ()

    def data(self) -> SampleModule:
        """The samples of this seed."""
        validation = self.settings.comparison.validation_samples
        return SampleModule(
            self.settings.data,
            self.model.tokenizer,
            self.seed,
            self.model.max_length,
            num_validation=validation,
            ranks=self.model.ranks,
        )

    def pattern(self, method: MethodSettings, scores: Tensor, **found: Any) -> HeadPattern:
        """Scores (gated layers, KV heads) as a pattern of the whole model; layers without gates are rows of 1."""
        gated = [layer.index for layer in self.layers]
        rows = torch.ones(self.model.num_layers, self.layers[0].kv_heads)
        rows[gated] = scores.float().cpu()
        return HeadPattern(rows, method.sink_size, method.recent_size, tuple(gated), found)


def identify(method: MethodSettings, run: Run) -> HeadPattern:
    """Carry a method out; the pattern's provenance says what the method alone knows.

    Raises:
        UserError: something in the settings cannot work; the message names the override.
        KeyboardInterrupt: after Ctrl-C, once progress is saved.
    """
    if isinstance(method, GateSettings):
        return _trained(method, run)
    ranks, devices = run.model.ranks, run.settings.trainer.get("devices")
    alike = ranks.group is None and not isinstance(method, SearchSettings)  # each process finds the same
    check(
        ranks.world == 1 or alike,
        f"trainer.devices={devices}: method={method.name} works on 1 device; on several do trained gates, and without "
        "step.sequence_parallel all but searches",
    )
    data = run.data()
    data.task("train")  # what cannot work is refused before anything is computed
    run.accepted()
    subject = Subject(run.model, run.layers, Window(method.sink_size, method.recent_size), run.settings.step.backends)
    if not isinstance(method, ScoreSettings):
        return run.pattern(method, random_scores(subject.shape, run.seed))
    samples = data.samples("train", method.samples)
    if isinstance(method, SearchSettings):
        if not run.settings.resume:
            (run.folder / ORDER).unlink(missing_ok=True)  # of another run in this folder
        start = _order("start", method.start, run)
        scores, told = search_scores(subject, samples, method, start, run.folder, run.console)
        return run.pattern(method, scores, **told)
    with _within_memory(subject, samples, method, run.settings.step):
        return run.pattern(method, mean_scores(subject, samples, method, run.console))


@contextmanager
def _within_memory(
    subject: Subject, samples: Sequence[Sample], method: ScoreSettings, step: StepSettings
) -> Iterator[None]:
    """Let layers keep what the memory holds of the longest sample, where a score takes a backward pass."""
    if not isinstance(method, SaliencySettings):
        yield
        return
    distillation = subject.distillation(make_objective(method.objective), method.tokens)
    with prepared(distillation, replace(step, compile=False)) as apply_plan:  # a few passes do not pay for compiling
        apply_plan(max(len(sample["input_ids"]) for sample in samples))
        yield


def _order(key: str, given: Any, run: Run) -> HeadPattern | None:
    """The pattern that `method.KEY` gives to another method, which a method of its own may have to find first."""
    if given is None:
        return None
    if isinstance(given, MethodSettings):
        lasting = isinstance(given, SearchSettings)  # what it has found is kept, for a run that is resumed
        accepted = run.accepted if lasting else lambda: None
        try:
            return identify(given, replace(run, folder=run.folder / key, accepted=accepted))
        except UserError as error:
            raise UserError(name_nested_override(key, str(error))) from error
    try:
        pattern = load_pattern(str(given))
        pattern.check_fits(run.model.num_layers, run.layers[0].kv_heads, run.model.name)
        pattern.check_scores(layer.index for layer in run.layers)
    except UserError as error:
        known = f"; the method of that name is {nested_override(key)}={given}" if given in METHODS else ""
        raise UserError(f"method.{key}={given}: {error}{known}") from error
    return pattern


def _prior(method: GateSettings, run: Run) -> HeadPattern | None:
    """The pattern whose order has a part in the scores of gates; what is wrong with it says how to do without."""
    try:
        return _order("prior", method.prior, replace(run, loggers=()))  # they show the gates' own training
    except UserError as error:
        raise UserError(f"{error}; method.prior=null does without") from error


def _trained(method: GateSettings, run: Run) -> HeadPattern:
    """Gates, trained by Lightning."""
    settings, data = run.settings, run.data()
    data.task("train")
    steps, checkpoint, timer = settings.trainer["max_steps"], run.folder / CHECKPOINT, Timer()
    given = _callbacks(settings) if method is settings.method else []  # not of one that comes before it
    bar = settings.trainer.get("enable_progress_bar", True) and not any(isinstance(one, ProgressBar) for one in given)
    trainer = instantiate(
        "trainer",
        # The stream of samples has no end, and ranks are told apart where samples are made.
        {"limit_train_batches": steps} | settings.trainer | {"use_distributed_sampler": False},
        about="callbacks" if given else "_target_",
        logger=list(run.loggers),
        callbacks=[
            *(
                []
                if settings.trainer.get("fast_dev_run")
                else [LastCheckpoint(run.folder, settings.checkpoint_seconds)]
            ),
            *([TrainingBar()] if bar else []),
            *([GateHistory(run.folder)] if run.model.ranks.first else []),
            GateTracking(settings.sparsity),
            timer,
            LambdaCallback(on_train_start=lambda *_: run.accepted()),
            *given,
        ],
        plugins=[AtomicCheckpointIO()],
        default_root_dir=str(run.folder),
    )
    prior = _prior(method, run)
    before = str(checkpoint) if settings.resume and checkpoint.is_file() else None
    gates = GateTraining(run.model, run.layers, method, settings.step, steps, settings.sparsity, run.seed)
    longest = settings.data.length_max or run.model.max_length
    with prepared(gates.distillation, settings.step) as gates.apply_plan:
        if longest is not None and settings.data.task != "disk":  # else each step says when it does not fit
            plan = gates.apply_plan(longest * settings.data.batch_size)
            if plan is not None:
                run.console.print(str(plan), soft_wrap=True, highlight=False, markup=False)
        try:
            trainer.fit(gates, datamodule=data, ckpt_path=before, weights_only=True)
        except SystemExit as end:
            if isinstance(end.__context__, KeyboardInterrupt):  # Lightning makes an exit of it, with status 1
                raise end.__context__ from None
            raise
        except Exception as error:  # whatever Lightning stumbles over in a checkpoint
            if before is None or isinstance(error, UserError) or not while_restoring(error):
                raise
            raise misfit(before, error) from error
    if gates.interrupted:
        stop(gates.interrupted)
    pattern = gates.pattern(steps=trainer.global_step, seconds_before=_before(timer))
    return pattern if prior is None else mix_prior(pattern, prior, method.prior_weight)


def _callbacks(settings: TrainSettings) -> list[Callback]:
    """The user's own, of `trainer.callbacks`."""
    found = []
    for place, one in enumerate(settings.trainer.get("callbacks") or []):
        known = isinstance(one, Mapping) and "_target_" in one
        callback = instantiate(f"trainer.callbacks.{place}", one) if known else None
        if not isinstance(callback, Callback):
            raise UserError(
                f"trainer.callbacks: {one} is no callback; give [{{_target_: MODULE.CLASS}}], a class of Lightning's "
                "Callback"
            )
        found.append(callback)
    return found


def _before(timer: Timer) -> float:
    """Seconds of training in earlier parts of a resumed run, as its checkpoint told."""
    start, end = timer.start_time(), timer.end_time()
    return timer.time_elapsed() - (0.0 if start is None or end is None else end - start)
