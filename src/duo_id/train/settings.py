"""Typed settings of `duo_id.train`: Hydra's config is checked here once; every error names the override to change.

What imports torch or Lightning is checked last, so that other mistakes are answered at once.
"""

from collections.abc import Mapping
from dataclasses import field
from typing import TYPE_CHECKING, Annotated, Any

from omegaconf import DictConfig
from pydantic import Field

from duo_id.common.config import (
    Count,
    Fraction,
    Number,
    Positive,
    Seed,
    Some,
    Text,
    parse,
    resolve,
    settings,
    shown,
)
from duo_id.common.errors import check
from duo_id.common.mistakes import check_importable
from duo_id.data.settings import DataSettings
from duo_id.methods.settings import GateSettings, MethodSettings, make_optimizer, method_settings
from duo_id.models.settings import ModelSettings
from duo_id.step.settings import StepSettings
from duo_id.train.trainer import Trainer, check_trainer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LENGTH_MIN, LENGTH_MAX, RECENT_SIZE = "data.length_min", "data.length_max", "method.recent_size"
LONGEST = 32000  # tokens of data.length_max=auto at most: attention's time grows with their square
AUTOMATIC = {LENGTH_MIN: LONGEST // 8, LENGTH_MAX: LONGEST, RECENT_SIZE: 1}  # may be `auto`; what is checked meanwhile


@settings("comparison")
class ComparisonSettings:
    """The table at the end of a training run, and the validation during it."""

    samples: Positive  # held-out samples of the final table
    random_masks: Count  # per sparsity
    validation_samples: Count  # held-out samples scored during training


@settings("")
class TrainSettings:
    """`python -m duo_id.train`: see conf/train.yaml."""

    model: ModelSettings
    data: DataSettings
    method: MethodSettings
    step: StepSettings
    comparison: ComparisonSettings
    sparsity: Annotated[
        Some[Fraction], Field(description="such as sparsity=[0.5]")
    ]  # of the exported masks: fractions of KV heads that stream
    trainer: Trainer
    logger: dict[str, dict[str, Any] | None] = field(default_factory=dict)  # null: off
    seed: Seed = 0
    repeats: Annotated[Positive, Field(le=10000)] = 1  # runs with consecutive seeds, whose scores are averaged
    checkpoint_seconds: Annotated[Number, Field(ge=0, le=1e9)] = 60.0  # between checkpoints
    resume: Text | None = None  # folder of a run to resume

    def __post_init__(self) -> None:
        """Check settings across groups."""
        self.sparsity = sorted(set(self.sparsity))
        window = self.method.sink_size + self.method.recent_size
        check(
            self.data.task == "disk" or window < self.data.length_min,
            f"method.sink_size + method.recent_size = {window} must be below data.length_min={self.data.length_min}, "
            "or nothing lies outside the window",
        )
        check(
            self.step.cuda_graphs is not True or self.data.batch_size == 1,
            f"step.cuda_graphs=true needs data.batch_size=1, not {self.data.batch_size}: heads would attend to padding",
        )
        check(
            self.seed + self.repeats <= 2**32,
            f"repeats={self.repeats}: seeds from seed={self.seed} on become too large",
        )
        check_trainer(self.trainer)
        self.logger = {name: config for name, config in self.logger.items() if config}
        for name, config in self.logger.items():
            target = config.get("_target_") if config else None
            check(
                isinstance(target, str) and bool(target),
                f"logger.{name}._target_={shown(target)} must name a class: choose logger=csv, tensorboard or wandb",
            )
        if self.trainer.get("fast_dev_run"):
            self.logger = {}  # Lightning logs nothing then


def train_settings(config: DictConfig | Mapping[str, Any], model: "PreTrainedModel | None" = None) -> TrainSettings:
    """The typed settings of a training run, including its method's; what is `auto` is decided.

    Args:
        config: composed, or plain values.
        model: the model; None: the one that the settings name.

    Raises:
        UserError: as `parse`, or the model cannot be found.
    """
    values, automatic = _with_values(resolve(config))
    values["method"] = method_settings(values.get("method", {}))
    settings = parse(TrainSettings, values)
    check(
        isinstance(settings.method, GateSettings) or not settings.trainer.get("callbacks"),
        f"trainer.callbacks: method={settings.method.name} trains nothing, so they would never be called",
    )
    check(
        settings.repeats == 1 or getattr(settings.method, "swap_at", None) is None,
        f"repeats={settings.repeats}: method.swap_at refines the mask of one run, which averaging several would undo",
    )
    _check_imported(settings)
    if automatic:
        from duo_id.train.fitting import fitted

        settings = fitted(settings, automatic, model)
    return settings


def _with_values(values: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """A copy of plain values with numbers for what is `auto`, so that all else is checked first; and what is `auto`."""
    copied, automatic = dict(values), []
    for override, value in AUTOMATIC.items():
        group, key = override.split(".")
        if isinstance(copied.get(group), Mapping) and copied[group].get(key) == "auto":
            copied[group] = {**copied[group], key: value}
            automatic.append(override)
    return copied, automatic


def _check_imported(settings: TrainSettings) -> None:
    """Create the optimizer and import the loggers: they fail now, not after loading a model."""
    if isinstance(settings.method, GateSettings):
        import torch

        make_optimizer(settings.method, [torch.nn.Parameter(torch.zeros(1))])
    for name, logger in settings.logger.items():
        check_importable(f"logger.{name}._target_", (logger or {}).get("_target_"))
