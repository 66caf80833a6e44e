"""What the terminal shows while gates train: a bar with the loss, the gates and the speed."""

import math
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
    """Lightning's bar with our metrics under short names; a log file gets a line for each tenth of the run instead."""

    def get_metrics(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> dict[str, Any]:
        """The metrics of the last step, as text."""
        metrics = trainer.progress_bar_metrics
        return {
            name: format(float(metrics[f"train/{name}"]), form)
            for name, form in SHOWN.items()
            if f"train/{name}" in metrics
        }

    def on_train_batch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, *args: Any) -> None:
        """Move the bar, or write a line."""
        super().on_train_batch_end(trainer, pl_module, *args)
        console = Console()
        if not console.is_terminal and trainer.global_step % math.ceil(trainer.max_steps / 10) == 0:
            shown = "  ".join(f"{name} {value}" for name, value in self.get_metrics(trainer, pl_module).items())
            console.print(f"step {trainer.global_step}/{trainer.max_steps}  {shown}", soft_wrap=True, highlight=False)

    def _get_train_description(self, current_epoch: int) -> str:
        return "training"
