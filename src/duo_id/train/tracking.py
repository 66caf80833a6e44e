"""What is logged besides Lightning's metrics: the config, each layer's sparsity, the gates as a figure, the pattern.

`logger=csv|wandb|tensorboard` chooses the loggers. Code for one kind of logger is only here.
"""

import sys
import uuid
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning
from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger

from duo_id.common.errors import UserError
from duo_id.common.files import write_text
from duo_id.common.mistakes import instantiate
from duo_id.patterns.pattern import HeadPattern, TieWarning

RUN_ID = "run_id.txt"  # in a run folder: a resumed run continues the same run of the tracking service


@contextmanager
def run_loggers(settings: Mapping[str, Any], folder: Path) -> Iterator[list[Logger]]:
    """The loggers of a run, closed after the block, so that the next run of this process gets its own.

    Args:
        settings: of each logger, by name: see conf/logger/.
        folder: of the run.

    Raises:
        UserError: a logger cannot be created.
    """
    previous = _wandb_run()
    has_failed = True
    try:
        yield [_logger(name, dict(config), folder) for name, config in settings.items()]
        has_failed = False
    except Exception as error:
        if type(error).__module__.partition(".")[0] != "wandb":
            raise
        reason = " ".join(str(error).split())
        raise UserError(
            f"logger=wandb: {reason} To keep the run on this machine alone: logger.wandb.offline=true"
        ) from error
    finally:
        if (run := _wandb_run()) is not None and run is not previous:
            run.finish(exit_code=int(has_failed))


def log_config(loggers: Sequence[Logger], config: dict[str, Any]) -> None:
    """Log the settings, the model and the versions."""
    for logger in loggers:
        logger.log_hyperparams(config)


def log_gates(loggers: Sequence[Logger], pattern: HeadPattern, sparsities: Sequence[float], step: int) -> None:
    """Log the pattern at a step: `layer_values` to every logger, its heatmap to those that take images."""
    for logger in loggers:
        logger.log_metrics(layer_values(pattern, sparsities), step)
        if isinstance(logger, WandbLogger):
            logger.log_image("gates", [pattern.plot(title=f"step {step}")], step=step)
        elif isinstance(logger, TensorBoardLogger):
            logger.experiment.add_figure("gates", pattern.plot(title=f"step {step}"), step)
        logger.save()


def log_heads(loggers: Sequence[Logger], heads: Path) -> None:
    """Log the exported pattern as an artifact, where a logger stores files."""
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            import wandb

            artifact = wandb.Artifact(f"heads-{logger.version}", type="head-pattern")
            artifact.add_dir(str(heads))
            logger.experiment.log_artifact(artifact)


def layer_values(pattern: HeadPattern, sparsities: Sequence[float]) -> dict[str, float]:
    """The mean score of each gated layer, and the fraction of its KV heads that stream at each sparsity, by column."""
    values = {}
    with warnings.catch_warnings(action="ignore", category=TieWarning):  # the export warns
        masks = {sparsity: pattern.binarize(sparsity=sparsity).retrieval for sparsity in sparsities}
    for layer in pattern.gated_layers:
        values[f"layers/score_{layer:02}"] = pattern.scores[layer].mean().item()
        for sparsity, mask in masks.items():
            streaming = 1 - mask[layer].float().mean().item()
            values[f"layers/sparsity_{100 * sparsity:g}_{layer:02}"] = streaming
    return values


class GateTracking(lightning.Callback):
    """Logs the gates after each validation and at the end."""

    def __init__(self, sparsities: Sequence[float]) -> None:
        """Log the fraction of each layer's heads that stream at these sparsities."""
        self.sparsities, self.step = sparsities, -1

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        """Log at the step of the validation's other metrics."""
        if not trainer.sanity_checking and trainer.global_step != self.step:
            self.step = trainer.global_step
            log_gates(trainer.loggers, pl_module.pattern(), self.sparsities, self.step)

    on_train_end = on_validation_end


def _logger(name: str, settings: dict[str, Any], folder: Path) -> Logger:
    if "id" in settings and not settings["id"]:
        path = folder / RUN_ID
        if not path.is_file():
            write_text(path, uuid.uuid4().hex[:8])
        settings["id"] = path.read_text(encoding="utf-8").strip()
    try:
        return instantiate(f"logger.{name}", settings, save_dir=str(folder))
    except UserError as error:
        from_lightning = str(settings.get("_target_")).startswith(
            "lightning."
        )  # which is there, so what it needs is not
        if not (from_lightning and isinstance(error.__cause__, ImportError)):
            raise
        raise UserError(f"logger={name} needs a package that is missing: pip install 'duo_id[{name}]'") from error


def _wandb_run() -> Any:
    """The wandb run that is active in this process."""
    return sys.modules["wandb"].run if "wandb" in sys.modules else None
