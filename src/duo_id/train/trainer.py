"""The arguments of Lightning's Trainer that a run takes, and their values: see conf/trainer/."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, with_config
from typing_extensions import TypedDict

from duo_id.common.config import LARGEST, Count, Named, Positive, PositiveWeight, Text, Whole, check_line, shown
from duo_id.common.errors import UserError, check

OURS = {  # arguments that a run gives itself or does without, and what to give instead
    "logger": "choose logger=csv, tensorboard or wandb, or ~logger for none",
    "default_root_dir": "a run writes to hydra.run.dir",
    "plugins": "the run has its own, which write checkpoints whole; how devices share the work is step.shard's",
    "use_distributed_sampler": "leave it out, for samples are shared out where they are made",
    "enable_checkpointing": "leave it out, for a run writes checkpoints every checkpoint_seconds",
    "max_time": "trainer.max_steps alone ends a run",
    "max_epochs": "trainer.max_steps alone ends a run",
    "min_steps": "trainer.max_steps alone ends a run",
    "min_epochs": "trainer.max_steps alone ends a run",
    "limit_test_batches": "leave it out, for a run tests by comparison.samples",
    "limit_predict_batches": "leave it out, for a run predicts nothing",
    "overfit_batches": "leave it out, for samples are drawn without end; data=disk repeats few",
}


def _determined(value: Any) -> Any:
    if not (value is None or isinstance(value, bool) or value == "warn"):
        raise ValueError(": choose one of true, false, warn")
    return value


def _share(value: Any) -> Any:
    """A number of batches, or a part of them all as a fraction: for Lightning 1 and 1.0 are not the same."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not (0 <= value <= (1 if isinstance(value, float) else LARGEST)):
        raise ValueError(" must be a whole number of batches, or a fraction such as 0.5")
    return value


def _some(value: Any) -> Any:
    if value == 0:
        raise ValueError(" must be at least 1")
    return value


def _devices(value: Any) -> Any:
    """How many, or which; Lightning says whether it can have them."""
    numbers = value if isinstance(value, list) else [value]
    least = 0 if isinstance(value, list) else -1
    whole = [not isinstance(one, bool) and isinstance(one, int) and least <= one <= LARGEST for one in numbers]
    if not (isinstance(check_line(value), str) and value) and not (numbers and all(whole) and value != 0):
        raise ValueError(" must be a number of devices, a list of their numbers, or auto")
    return value


def _object(value: Any) -> Any:
    """A name, or a class and its arguments."""
    if not (isinstance(check_line(value), str) and value) and not (
        isinstance(value, Mapping) and value.get("_target_")
    ):
        raise ValueError(" must be a name, or {_target_: MODULE.CLASS}")
    return value


def _ours(given: Any) -> Any:
    for key, instead in OURS.items():
        if isinstance(given, Mapping) and key in given:
            raise UserError(f"trainer.{key}={shown(given[key])}: {instead}")
    return given


def _dev_run(value: Any) -> Any:
    if not isinstance(value, int) or not 0 <= value <= LARGEST:
        raise ValueError(" must be true, false or a number of batches")
    return value


Share = Annotated[Any, BeforeValidator(_share)]
SomeShare = Annotated[Share, AfterValidator(_some)]
Object = Annotated[Any, BeforeValidator(_object)]


@with_config(ConfigDict(extra="forbid"))
class TrainerSettings(TypedDict, total=False):
    """A mapping of what is given; what is not has Lightning's default."""

    _target_: Text
    accelerator: Text
    strategy: Object
    devices: Annotated[Any, BeforeValidator(_devices)]
    num_nodes: Positive
    precision: Any
    callbacks: Named  # made, and refused, where they are
    fast_dev_run: Annotated[Any, BeforeValidator(_dev_run)]
    max_steps: Positive
    limit_train_batches: SomeShare | None
    limit_val_batches: Share | None
    val_check_interval: SomeShare
    check_val_every_n_epoch: Positive | None
    num_sanity_val_steps: Annotated[Whole, Field(ge=-1, le=LARGEST)] | None
    log_every_n_steps: Positive
    enable_progress_bar: bool | None
    enable_model_summary: bool | None
    accumulate_grad_batches: Positive
    gradient_clip_val: PositiveWeight | None
    gradient_clip_algorithm: Literal["norm", "value"] | None
    deterministic: Annotated[Any, BeforeValidator(_determined)]
    benchmark: bool | None
    inference_mode: bool
    profiler: Object | None
    detect_anomaly: bool
    barebones: bool
    sync_batchnorm: bool
    reload_dataloaders_every_n_epochs: Count
    enable_autolog_hparams: bool
    model_registry: Text | None


Trainer = Annotated[TrainerSettings, BeforeValidator(_ours)]


def check_run(given: TrainerSettings) -> None:
    """Raise a `UserError` unless a training run can go on under these arguments; one callback becomes a list."""
    steps, precision = given.get("max_steps"), given.get("precision", "32-true")
    check(steps is not None, "trainer.max_steps: its value is missing, give trainer.max_steps=VALUE")
    check(
        precision in (32, "32", "32-true") and not isinstance(precision, bool),
        f"trainer.precision={shown(precision)}: gates stay float32; what the model computes in is model.dtype",
    )
    check(given.get("accumulate_grad_batches", 1) == 1, "trainer.accumulate_grad_batches: use data.batch_size instead")
    callbacks = given.get("callbacks")
    if callbacks is not None and not isinstance(callbacks, list):
        given["callbacks"] = [callbacks]
    for one in given.get("callbacks") or []:
        check(
            isinstance(one, Mapping) and isinstance(one.get("_target_"), str),
            f"trainer.callbacks: {shown(one)} is no callback; give [{{_target_: MODULE.CLASS}}], a class of "
            "Lightning's Callback",
        )
