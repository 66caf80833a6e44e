"""Typed settings of `duo_id.train`: Hydra's config is checked here once; every error names the override to change.

What imports torch or Lightning is checked last, so that other mistakes are answered at once.
"""

from dataclasses import field
from typing import Annotated, Any

from pydantic import Field

from duo_id.common.config import (
    Count,
    Fraction,
    Number,
    Positive,
    Seed,
    Some,
    Text,
    settings,
    shown,
)
from duo_id.common.errors import check
from duo_id.data.settings import DataSettings
from duo_id.methods.settings import MethodSettings
from duo_id.models.settings import ModelSettings
from duo_id.step.settings import StepSettings
from duo_id.train.trainer import Trainer, check_trainer


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
