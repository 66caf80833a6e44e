"""What loggers get beside Lightning's metrics: the config, each layer's sparsity, the gates as a figure, the pattern.

`logger=csv|wandb|tensorboard` chooses them. What is particular to one kind of logger is here and nowhere else.
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
from duo_id.patterns.plots import plot_gates

RUN_ID = "run_id.txt"  # in a run folder: a resumed run goes on in the same run of the tracking service


@contextmanager
def tracked(settings: Mapping[str, Any], folder: Path) -> Iterator[list[Logger]]:
    """The loggers of a run, which end with the block, so that the next run of this process gets its own.

    Args:
        settings: of each logger, by name: see conf/logger/.
        folder: of the run.

    Raises:
        UserError: a logger cannot be had.
    """
    earlier = _wandb_run()
    failed = True
    try:
        yield [_logger(name, dict(one), folder) for name, one in settings.items()]
        failed = False
    except Exception as error:
        if type(error).__module__.partition(".")[0] != "wandb":
            raise
        reason = " ".join(str(error).split())
        raise UserError(
            f"logger=wandb: {reason} To keep the run on this machine alone: logger.wandb.offline=true"
        ) from error
    finally:
        if (run := _wandb_run()) is not None and run is not earlier:
            run.finish(exit_code=int(failed))


def log_config(loggers: Sequence[Logger], config: dict[str, Any]) -> None:
    """What the run was asked for: the settings, the model and versions."""
    for logger in loggers:
        logger.log_hyperparams(config)


def log_gates(loggers: Sequence[Logger], pattern: HeadPattern, sparsities: Sequence[float], step: int) -> None:
    """The pattern at a step: `layer_values` to every logger, and its heatmap to those that show pictures."""
    for logger in loggers:
        logger.log_metrics(layer_values(pattern, sparsities), step)
        if isinstance(logger, WandbLogger):
            logger.log_image("gates", [plot_gates(pattern, title=f"step {step}")], step=step)
        elif isinstance(logger, TensorBoardLogger):
            logger.experiment.add_figure("gates", plot_gates(pattern, title=f"step {step}"), step)
        logger.save()


def log_heads(loggers: Sequence[Logger], heads: Path) -> None:
    """The exported pattern, as an artifact where a logger keeps files."""
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            import wandb

            artifact = wandb.Artifact(f"heads-{logger.version}", type="head-pattern")
            artifact.add_dir(str(heads))
            logger.experiment.log_artifact(artifact)


def layer_values(pattern: HeadPattern, sparsities: Sequence[float]) -> dict[str, float]:
    """The mean score of each gated layer, and the part of its KV heads that streams at each sparsity, by column."""
    values = {}
    with warnings.catch_warnings(action="ignore", category=TieWarning):  # the export tells them
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
        """Log which part of each layer streams at these sparsities."""
        self.sparsities, self.step = sparsities, -1

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        """Log, where other metrics of the validation are."""
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
        ours = str(settings.get("_target_")).startswith("lightning.")  # which is there, so what it needs is not
        if not (ours and isinstance(error.__cause__, ImportError)):
            raise
        raise UserError(f"logger={name} needs a package that is missing: pip install 'duo_id[{name}]'") from error


def _wandb_run() -> Any:
    """The run that is under way in this process."""
    return sys.modules["wandb"].run if "wandb" in sys.modules else None
