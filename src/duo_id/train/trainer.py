"""The arguments of Lightning's Trainer that a run accepts, and their values: see conf/trainer/."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, with_config
from typing_extensions import TypedDict

from duo_id.common.config import LARGEST, Count, Named, Positive, PositiveWeight, Text, Whole, check_line, shown
from duo_id.common.errors import UserError, check

RESERVED = {  # arguments that a run sets itself or does not need, and what to do instead
    "logger": "choose logger=csv, tensorboard or wandb, or ~logger for none",
    "default_root_dir": "a run writes to hydra.run.dir",
    "plugins": "the run has its own, which writes checkpoints atomically; step.shard sets how devices share the work",
    "use_distributed_sampler": "leave it out, the data module splits samples between devices",
    "enable_checkpointing": "leave it out, a run writes checkpoints every checkpoint_seconds",
    "max_time": "trainer.max_steps alone ends a run",
    "max_epochs": "trainer.max_steps alone ends a run",
    "min_steps": "trainer.max_steps alone ends a run",
    "min_epochs": "trainer.max_steps alone ends a run",
    "limit_test_batches": "leave it out, comparison.samples sets the number of test samples",
    "limit_predict_batches": "leave it out, a run predicts nothing",
    "overfit_batches": "leave it out, samples are generated endlessly; data=disk repeats a few",
}


def _deterministic(value: Any) -> Any:
    if not (value is None or isinstance(value, bool) or value == "warn"):
        raise ValueError(": choose one of true, false, warn")
    return value


def _batch_share(value: Any) -> Any:
    """A number of batches, or a fraction of all: for Lightning 1 and 1.0 are not the same."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not (0 <= value <= (1 if isinstance(value, float) else LARGEST)):
        raise ValueError(" must be a whole number of batches, or a fraction such as 0.5")
    return value


def _nonzero(value: Any) -> Any:
    if value == 0:
        raise ValueError(" must be at least 1")
    return value


def _devices(value: Any) -> Any:
    """A number of devices or their indices; Lightning checks whether they exist."""
    numbers = value if isinstance(value, list) else [value]
    least = 0 if isinstance(value, list) else -1
    are_numbers = [
        not isinstance(number, bool) and isinstance(number, int) and least <= number <= LARGEST for number in numbers
    ]
    if not (isinstance(check_line(value), str) and value) and not (numbers and all(are_numbers) and value != 0):
        raise ValueError(" must be a number of devices, a list of their numbers, or auto")
    return value


def _name_or_class(value: Any) -> Any:
    """A name, or a class and its arguments."""
    if not (isinstance(check_line(value), str) and value) and not (
        isinstance(value, Mapping) and value.get("_target_")
    ):
        raise ValueError(" must be a name, or {_target_: MODULE.CLASS}")
    return value


def _refuse_reserved(values: Any) -> Any:
    for key, advice in RESERVED.items():
        if isinstance(values, Mapping) and key in values:
            raise UserError(f"trainer.{key}={shown(values[key])}: {advice}")
    return values


def _fast_dev_run(value: Any) -> Any:
    if not isinstance(value, int) or not 0 <= value <= LARGEST:
        raise ValueError(" must be true, false or a number of batches")
    return value


Share = Annotated[Any, BeforeValidator(_batch_share)]
PositiveShare = Annotated[Share, AfterValidator(_nonzero)]
Object = Annotated[Any, BeforeValidator(_name_or_class)]


@with_config(ConfigDict(extra="forbid"))
class TrainerSettings(TypedDict, total=False):
    """The given arguments; all others have Lightning's defaults."""

    _target_: Text
    accelerator: Text
    strategy: Object
    devices: Annotated[Any, BeforeValidator(_devices)]
    num_nodes: Positive
    precision: Any
    callbacks: Named  # checked when they are created
    fast_dev_run: Annotated[Any, BeforeValidator(_fast_dev_run)]
    max_steps: Positive
    limit_train_batches: PositiveShare | None
    limit_val_batches: Share | None
    val_check_interval: PositiveShare
    check_val_every_n_epoch: Positive | None
    num_sanity_val_steps: Annotated[Whole, Field(ge=-1, le=LARGEST)] | None
    log_every_n_steps: Positive
    enable_progress_bar: bool | None
    enable_model_summary: bool | None
    accumulate_grad_batches: Positive
    gradient_clip_val: PositiveWeight | None
    gradient_clip_algorithm: Literal["norm", "value"] | None
    deterministic: Annotated[Any, BeforeValidator(_deterministic)]
    benchmark: bool | None
    inference_mode: bool
    profiler: Object | None
    detect_anomaly: bool
    barebones: bool
    sync_batchnorm: bool
    reload_dataloaders_every_n_epochs: Count
    enable_autolog_hparams: bool
    model_registry: Text | None


Trainer = Annotated[TrainerSettings, BeforeValidator(_refuse_reserved)]


def check_trainer(trainer: TrainerSettings) -> None:
    """Raise a `UserError` unless a training run works with these arguments; a single callback becomes a list."""
    steps, precision = trainer.get("max_steps"), trainer.get("precision", "32-true")
    check(steps is not None, "trainer.max_steps: its value is missing, give trainer.max_steps=VALUE")
    check(
        precision in (32, "32", "32-true") and not isinstance(precision, bool),
        f"trainer.precision={shown(precision)}: gates stay float32; set the model's precision by model.dtype",
    )
    check(
        trainer.get("accumulate_grad_batches", 1) == 1, "trainer.accumulate_grad_batches: use data.batch_size instead"
    )
    callbacks = trainer.get("callbacks")
    if callbacks is not None and not isinstance(callbacks, list):
        trainer["callbacks"] = [callbacks]
    for callback in trainer.get("callbacks") or []:
        check(
            isinstance(callback, Mapping) and isinstance(callback.get("_target_"), str),
            f"trainer.callbacks: {shown(callback)} is not a callback; give [{{_target_: MODULE.CLASS}}], a class of "
            "Lightning's Callback",
        )
