"""Progress of gate training in the terminal: a bar of one line with the loss and what else fits."""

import math
import time
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.callbacks.progress.rich_progress import BatchesProcessedColumn, CustomTimeColumn
from rich.console import Console
from rich.progress import BarColumn, ProgressColumn, TextColumn

from duo_id.common.progress import LONG, duration, headline
from duo_id.models.gated_model import GatedModel
from duo_id.train.settings import TrainSettings

SHOWN = {
    "loss": ".4f",
    "distill": ".4f",
    "penalty": ".3f",
    "mean_gate": ".3f",
    "length": ".0f",
    "tokens_per_s": ",.0f",
}
CPU_STEPS, CPU_TOKENS = 100, 1000  # a run with as many steps on longer samples takes a CPU hours
BAR = 12  # characters of the bar itself
TIMES = len("0:00:00 • 0:00:00")


def introduction(gated_model: GatedModel, settings: TrainSettings, folder: Path | None = None) -> list[str]:
    """The first lines of a run: what it does, and whether that is too much for a CPU.

    Args:
        gated_model: the model.
        settings: of the run.
        folder: of the run; None: it keeps none.
    """
    model, data, method, steps = gated_model.model, settings.data, settings.method, settings.trainer["max_steps"]
    trains = method.devices == "shared"
    longest = data.length_max or model.max_length
    sizes = f"{f'{steps} steps' if trains else 'scores'}, samples of {data.length_min} to {longest} tokens"
    if longest and model.max_length and longest <= model.max_length // 2 and gated_model.device.type != "cpu":
        sizes += f" (the model takes {model.max_length})"
    lines = [headline(model.name, gated_model.device, gated_model.shape, f"method={method.name}", sizes, folder)]
    if trains and gated_model.device.type == "cpu" and steps >= CPU_STEPS and (longest or 0) > CPU_TOKENS:
        lines.append(
            f"{steps} steps on samples of up to {longest} tokens are meant for a GPU: on a CPU lower "
            "trainer.max_steps or data.length_max"
        )
    return lines


class TrainingBar(RichProgressBar):
    """Lightning's bar with our metrics under short names; a log file instead gets a line per tenth of the run."""

    def __init__(self, console_kwargs: dict[str, Any] | None = None, tokens: float | None = None) -> None:
        """Start without metrics.

        Args:
            console_kwargs: as in Lightning.
            tokens: of a step on average; None: it is not known.
        """
        super().__init__(console_kwargs=console_kwargs)
        self._shown: dict[str, Any] = {}
        self._tokens = tokens
        self._steps_before = 0  # of earlier parts of a resumed run
        self._began = self._step_began = 0.0

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Start the clock."""
        super().on_train_start(trainer, pl_module)
        self._steps_before, self._began = trainer.global_step, time.perf_counter()

    def setup(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        """Show no bar where nobody can watch it move."""
        super().setup(trainer, pl_module, stage)
        console = Console(**self._console_kwargs)
        if not (console.is_terminal or console.is_jupyter):
            self.disable()

    def configure_columns(self, trainer: lightning.Trainer) -> list[ProgressColumn]:
        """What stands before the metrics, narrow enough to leave room for them."""
        times = CustomTimeColumn(style=self.theme.time)
        steps = BatchesProcessedColumn(style=self.theme.batch_progress)
        return [TextColumn("{task.description}"), BarColumn(BAR), steps, times]

    def get_metrics(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> dict[str, Any]:
        """The metrics of the last logged step, as text: reading them at every step would wait for the device."""
        if not self._shown or trainer.global_step % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            steps = 2 * len(str(trainer.max_steps)) + 1
            before = len(f"{self._get_train_description(0)} ") + BAR + 1 + steps + 1 + TIMES + 1
            width = self._console.width if self._console else Console().width
            self._shown = _fitting(_as_text(trainer.progress_bar_metrics), width - before)
        return self._shown

    def on_train_batch_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, *_: Any) -> None:
        """Start the clock of a step."""
        self._step_began = time.perf_counter()

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, *args: Any
    ) -> None:
        """Advance the bar, or write a line; after the first step on a CPU say how long training takes."""
        super().on_train_batch_end(trainer, pl_module, outputs, batch, *args)
        if not trainer.is_global_zero:
            return
        done, left = trainer.global_step - self._steps_before, trainer.max_steps - trainer.global_step
        if done == 1 and pl_module.device.type == "cpu":  # elsewhere the first steps warm up
            self._announce(time.perf_counter() - self._step_began, left, batch)
        if trainer.global_step % math.ceil(trainer.max_steps / 10) == 0 and self.is_disabled:
            shown = "  ".join(f"{name} {value}" for name, value in _as_text(trainer.progress_bar_metrics).items())
            seconds = timedelta(seconds=round((time.perf_counter() - self._began) / done * left))
            self._say(f"step {trainer.global_step}/{trainer.max_steps}  {shown}  left: {seconds}")

    def _announce(self, seconds: float, left: int, batch: Any) -> None:
        """Say how long the other steps take if they are like the first, or in proportion to their tokens."""
        tokens = batch["length"] * len(batch["input_ids"]) if isinstance(batch, Mapping) else 0
        scale = self._tokens / tokens if self._tokens and tokens else 1.0
        if (total := seconds * scale * left) >= LONG:
            sizes = f"{tokens:,} tokens in " if tokens else ""
            self._say(f"first step: {sizes}{duration(seconds)}; about {duration(total)} for the other {left}")

    def _say(self, line: str) -> None:
        """Print a line above the bar, or where there is none."""
        console = self.progress.console if self.progress is not None else Console(**self._console_kwargs)
        console.print(line, soft_wrap=True, highlight=False, markup=False)

    def _get_train_description(self, current_epoch: int) -> str:
        return "training"


def _fitting(shown: Mapping[str, str], room: int) -> dict[str, str]:
    """The first metrics, and of those that follow whichever fit into so many characters."""
    fitting: dict[str, str] = {}
    for name, value in shown.items():
        size = len(f"{name}: {value}") + bool(fitting)
        if size <= room or not fitting:
            fitting[name] = value
            room -= size
    return fitting


def _as_text(metrics: Mapping[str, Any]) -> dict[str, str]:
    names = [name for name in SHOWN if f"train/{name}" in metrics]
    return {name: format(float(metrics[f"train/{name}"]), SHOWN[name]) for name in names}
