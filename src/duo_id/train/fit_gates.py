"""`method=duo` and `method=nested`: train gates with Lightning."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback, LambdaCallback, ProgressBar, Timer
from lightning.pytorch.loggers import Logger

from duo_id.common.errors import UserError
from duo_id.common.mistakes import instantiate
from duo_id.common.stopping import stop
from duo_id.data.datamodule import SampleModule
from duo_id.data.samples import Task
from duo_id.methods.run import Run
from duo_id.methods.settings import GateSettings
from duo_id.models.gated_model import GatedModel
from duo_id.models.language_model import LanguageModel
from duo_id.patterns.combining import mix_prior
from duo_id.patterns.pattern import HeadPattern
from duo_id.step.prepare import prepared_step
from duo_id.train.checkpoints import CHECKPOINT, AtomicCheckpointIO, LastCheckpoint
from duo_id.train.gate_training import GateTraining
from duo_id.train.history import GateHistory
from duo_id.train.progress import TrainingBar
from duo_id.train.restoring import checkpoint_error, raised_while_restoring
from duo_id.train.settings import TrainSettings
from duo_id.train.tracking import GateTracking


@dataclass(frozen=True, kw_only=True)
class TrainRun(Run):
    """A run of the command.

    Attributes:
        settings: of the whole run.
        loggers: of the training's metrics.
        tasks: of splits whose samples are not those that the settings name.
        patterns: in memory, by what `method.prior` or `method.start` calls them.
    """

    settings: TrainSettings
    loggers: Sequence[Logger] = ()
    tasks: Mapping[str, Task] = field(default_factory=dict)
    patterns: Mapping[str, HeadPattern] = field(default_factory=dict)


def sample_module(
    model: LanguageModel, settings: TrainSettings, seed: int, tasks: Mapping[str, Task] | None = None
) -> SampleModule:
    """The data module of a seed; `tasks`: see `TrainRun`."""
    held_out = settings.comparison.validation_samples
    return SampleModule(
        settings.data, model.tokenizer, seed, model.max_length, num_validation=held_out, ranks=model.ranks, tasks=tasks
    )


def find(gated_model: GatedModel, samples: SampleModule, method: GateSettings, run: TrainRun) -> HeadPattern:
    """Train the gates; a prior is mixed into their scores."""
    settings, timer = run.settings, Timer()
    callbacks = [*([GateHistory(run.folder)] if gated_model.model.ranks.first else []), timer]
    trainer = _trainer(method, run, callbacks, gated_model.model.max_length)
    prior = _load_prior(run)
    checkpoint = run.folder / CHECKPOINT
    checkpoint_path = str(checkpoint) if run.resume and checkpoint.is_file() else None
    steps = settings.trainer["max_steps"]
    gates = GateTraining(gated_model, method, run.step, steps, settings.sparsity, run.seed)
    longest = settings.data.length_max or gated_model.model.max_length
    with prepared_step(gates.distillation, run.step) as gates.apply_plan:
        if longest is not None and settings.data.task != "disk":  # otherwise each step checks itself
            plan = gates.apply_plan(longest * settings.data.batch_size)
            if plan is not None:
                if gates.graphs is not None:
                    gates.graphs.room = plan.room
                run.console.print(str(plan), soft_wrap=True, highlight=False, markup=False)
        try:
            trainer.fit(gates, datamodule=samples, ckpt_path=checkpoint_path, weights_only=True)
        except SystemExit as exit_error:
            if isinstance(exit_error.__context__, KeyboardInterrupt):  # Lightning turns it into an exit with status 1
                raise exit_error.__context__ from None
            raise
        except Exception as error:  # Lightning raises anything on a checkpoint that does not fit
            if checkpoint_path is None or isinstance(error, UserError) or not raised_while_restoring(error):
                raise
            raise checkpoint_error(checkpoint_path, error) from error
    if gates.interrupted and not run.partial:
        stop(gates.interrupted)
    interrupted = {"interrupted": True} if gates.interrupted else {}
    pattern = gates.pattern(steps=trainer.global_step, seconds_before=_seconds_before(timer), **interrupted)
    return pattern if prior is None else mix_prior(pattern, prior, method.prior_weight)


def _trainer(method: GateSettings, run: TrainRun, callbacks: Sequence[Callback], max_length: int | None) -> Trainer:
    """The trainer of the settings, with the user's callbacks and ours."""
    settings = run.settings
    user_callbacks = (
        _user_callbacks(settings) if method is settings.method else []
    )  # not for a method that comes before it
    own_callbacks = [
        *callbacks,
        GateTracking(settings.sparsity),
        LambdaCallback(on_train_start=lambda *_: run.on_accepted()),
    ]
    if not settings.trainer.get("fast_dev_run"):
        own_callbacks.append(LastCheckpoint(run.folder, settings.checkpoint_seconds))
    if settings.trainer.get("enable_progress_bar") is not False and not any(
        isinstance(callback, ProgressBar) for callback in user_callbacks
    ):
        own_callbacks.append(TrainingBar(tokens=_mean_tokens(run, max_length)))
    trainer: Trainer = instantiate(
        "trainer",
        # The stream of samples is endless, and the data module splits it between ranks itself.
        {"limit_train_batches": settings.trainer["max_steps"]} | settings.trainer | {"use_distributed_sampler": False},
        default_key="callbacks" if user_callbacks else "_target_",
        logger=list(run.loggers),
        callbacks=[*own_callbacks, *user_callbacks],
        plugins=[AtomicCheckpointIO()],
        default_root_dir=str(run.folder),
    )
    return trainer


def _mean_tokens(run: TrainRun, max_length: int | None) -> float | None:
    """Tokens of a step on average, all devices together; None if the samples themselves decide."""
    data, longest = run.settings.data, run.settings.data.length_max or max_length
    if run.tasks or data.task == "disk" or data.curriculum or longest is None:
        return None
    return data.batch_size * (data.length_min + longest) / 2


def _load_prior(run: TrainRun) -> HeadPattern | None:
    """The pattern whose order is mixed into the scores, if any; errors say how to do without."""
    try:
        return run.named_pattern()
    except UserError as error:
        raise UserError(f"{error}; method.prior=null does without") from error


def _user_callbacks(settings: TrainSettings) -> list[Callback]:
    """The callbacks of `trainer.callbacks`."""
    callbacks = []
    for index, config in enumerate(settings.trainer.get("callbacks") or []):
        is_object = isinstance(config, Mapping) and "_target_" in config
        callback = instantiate(f"trainer.callbacks.{index}", config) if is_object else None
        if not isinstance(callback, Callback):
            raise UserError(
                f"trainer.callbacks: {config} is not a callback; give [{{_target_: MODULE.CLASS}}], a class of "
                "Lightning's Callback"
            )
        callbacks.append(callback)
    return callbacks


def _seconds_before(timer: Timer) -> float:
    """Seconds of training in earlier parts of a resumed run, from its checkpoint."""
    start, end = timer.start_time(), timer.end_time()
    return timer.time_elapsed() - (0.0 if start is None or end is None else end - start)
