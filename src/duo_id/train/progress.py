"""Progress of gate training in the terminal: a bar with loss, gates and speed."""

import math
from collections.abc import Mapping
from typing import Any

import lightning
from lightning.pytorch.callbacks import RichProgressBar
from rich.console import Console

SHOWN = {
    "loss": ".4f",
    "distill": ".4f",
    "penalty": ".3f",
    "mean_gate": ".3f",
    "length": ".0f",
    "tokens_per_s": ",.0f",
}


class TrainingBar(RichProgressBar):
    """Lightning's bar with our metrics under short names; a log file instead gets a line per tenth of the run."""

    def __init__(self) -> None:
        """Start without metrics."""
        super().__init__()
        self._shown: dict[str, Any] = {}

    def get_metrics(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> dict[str, Any]:
        """The metrics of the last logged step, as text: reading them at every step would wait for the device."""
        if not self._shown or trainer.global_step % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            self._shown = _as_text(trainer.progress_bar_metrics)
        return self._shown

    def on_train_batch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, *args: Any) -> None:
        """Advance the bar, or write a line."""
        super().on_train_batch_end(trainer, pl_module, *args)
        tenth = trainer.global_step % math.ceil(trainer.max_steps / 10) == 0
        if tenth and trainer.is_global_zero and not (console := Console()).is_terminal:
            shown = "  ".join(f"{name} {value}" for name, value in _as_text(trainer.progress_bar_metrics).items())
            line = f"step {trainer.global_step}/{trainer.max_steps}  {shown}"
            console.print(line, soft_wrap=True, highlight=False, markup=False)

    def _get_train_description(self, current_epoch: int) -> str:
        return "training"


def _as_text(metrics: Mapping[str, Any]) -> dict[str, str]:
    names = [name for name in SHOWN if f"train/{name}" in metrics]
    return {name: format(float(metrics[f"train/{name}"]), SHOWN[name]) for name in names}
