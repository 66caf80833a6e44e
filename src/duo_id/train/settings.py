"""Typed settings: what Hydra composes is checked here once, and every error names the override to change."""

from collections.abc import Mapping
from dataclasses import field
from typing import Annotated, Any

import torch
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
from duo_id.train.trainer import Trainer, check_run


@settings("comparison")
class ComparisonSettings:
    """The table at the end of a training run, and the validation during it."""

    samples: Positive  # held-out samples of the final table
    random_masks: Count  # random masks at each sparsity
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
    ]  # fractions of KV heads that stream, of the exported masks
    trainer: Trainer
    logger: dict[str, dict[str, Any] | None] = field(default_factory=dict)  # null: not this one
    seed: Seed = 0
    repeats: Annotated[Positive, Field(le=10000)] = 1  # runs with the seeds from `seed` on, whose scores are averaged
    checkpoint_seconds: Annotated[Number, Field(ge=0, le=1e9)] = 60.0  # between checkpoints
    resume: Text | None = None  # a run folder to go on with

    def __post_init__(self) -> None:
        """Check what depends on several groups."""
        self.sparsity = sorted(set(self.sparsity))
        window = self.method.sink_size + self.method.recent_size
        check(
            self.data.task == "disk" or window < self.data.length_min,
            f"method.sink_size + method.recent_size = {window} must be below data.length_min={self.data.length_min}, "
            "or nothing lies outside the window",
        )
        check(
            not self.step.cuda_graphs or self.data.batch_size == 1,
            f"step.cuda_graphs=true needs data.batch_size=1, not {self.data.batch_size}: padding would be looked at",
        )
        check(
            self.seed + self.repeats <= 2**32,
            f"repeats={self.repeats}: the last seed, from seed={self.seed} on, is too large",
        )
        check_run(self.trainer)
        self.logger = {name: one for name, one in self.logger.items() if one}
        for name, one in self.logger.items():
            target = one.get("_target_") if one else None
            check(
                isinstance(target, str) and bool(target),
                f"logger.{name}._target_={shown(target)} must name a class: choose logger=csv, tensorboard or wandb",
            )
        if self.trainer.get("fast_dev_run"):
            self.logger = {}  # Lightning logs nothing then


def train_settings(config: DictConfig | Mapping[str, Any]) -> TrainSettings:
    """The typed settings of a training run, its method's among them.

    Raises:
        UserError: as `parse`.
    """
    given = dict(resolve(config))
    given["method"] = method_settings(given.get("method", {}))
    settings = parse(TrainSettings, given)
    check(
        isinstance(settings.method, GateSettings) or not settings.trainer.get("callbacks"),
        f"trainer.callbacks: method={settings.method.name} trains nothing that they could be called at",
    )
    if isinstance(settings.method, GateSettings):
        make_optimizer(settings.method, [torch.nn.Parameter(torch.zeros(1))])  # told now, not once a model is loaded
    for name, one in settings.logger.items():
        check_importable(f"logger.{name}._target_", (one or {}).get("_target_"))
    check(
        settings.repeats == 1 or getattr(settings.method, "swap_at", None) is None,
        f"repeats={settings.repeats}: heads are exchanged (method.swap_at) in the mask of one run; the mean of several "
        "has another",
    )
    return settings
