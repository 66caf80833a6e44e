"""Progress of gate training in the terminal: a bar of one line with the loss and what else fits."""

import math
from collections.abc import Mapping
from typing import Any

import lightning
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.callbacks.progress.rich_progress import BatchesProcessedColumn, CustomTimeColumn
from rich.console import Console
from rich.progress import BarColumn, ProgressColumn, TextColumn

SHOWN = {
    "loss": ".4f",
    "distill": ".4f",
    "penalty": ".3f",
    "mean_gate": ".3f",
    "length": ".0f",
    "tokens_per_s": ",.0f",
}
BAR = 12  # characters of the bar itself
TIMES = len("0:00:00 • 0:00:00")


class TrainingBar(RichProgressBar):
    """Lightning's bar with our metrics under short names; a log file instead gets a line per tenth of the run."""

    def __init__(self, console_kwargs: dict[str, Any] | None = None) -> None:
        """Start without metrics; `console_kwargs` as in Lightning."""
        super().__init__(console_kwargs=console_kwargs)
        self._shown: dict[str, Any] = {}

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

    def on_train_batch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, *args: Any) -> None:
        """Advance the bar, or write a line."""
        super().on_train_batch_end(trainer, pl_module, *args)
        tenth = trainer.global_step % math.ceil(trainer.max_steps / 10) == 0
        if tenth and trainer.is_global_zero and self.is_disabled:
            shown = "  ".join(f"{name} {value}" for name, value in _as_text(trainer.progress_bar_metrics).items())
            line = f"step {trainer.global_step}/{trainer.max_steps}  {shown}"
            Console(**self._console_kwargs).print(line, soft_wrap=True, highlight=False, markup=False)

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
