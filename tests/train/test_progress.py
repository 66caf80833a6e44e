import re
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from lightning import Trainer
from lightning.pytorch.demos.boring_classes import BoringModel

from duo_id.train.progress import TrainingBar
from tests.support.commands import QUICK, run_command


def test_a_log_file_gets_a_line_for_each_tenth_of_the_run(tmp_path: Path) -> None:
    steps = 12
    quicker = ["comparison.samples=1", "comparison.random_masks=0", "comparison.validation_samples=0"]
    finished = run_command("train", *QUICK, *quicker, f"trainer.max_steps={steps}", folder=tmp_path)
    lines = [line for line in finished.output.splitlines() if line.startswith("step ")]
    assert [line.split("  ")[0] for line in lines] == [f"step {step}/{steps}" for step in (2, 4, 6, 8, 10, 12)]
    form = r"  loss [\d.]+  distill [\d.]+  length \d+  tokens_per_s [\d,]+"
    assert all(re.fullmatch(rf"step \S+{form}", line) for line in lines)


def test_the_bar_reads_metrics_only_where_they_are_logged() -> None:
    class Trainer:
        global_step, log_every_n_steps, max_steps, reads = 0, 5, 400, 0

        @property
        def progress_bar_metrics(self) -> dict[str, float]:
            self.reads += 1
            return {"train/loss": float(self.global_step), "other": 1.0}

    trainer, bar = Trainer(), TrainingBar()
    shown = []
    for trainer.global_step in range(1, 12):
        shown.append(bar.get_metrics(trainer, None)["loss"])
    assert trainer.reads == 3  # the first, 5 and 10
    assert shown == ["1.0000"] * 4 + ["5.0000"] * 5 + ["10.0000"] * 2


class Logging(BoringModel):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        names = ("loss", "distill", "penalty", "mean_gate", "length", "tokens_per_s")
        self.log_dict({f"train/{name}": 12345.0 for name in names}, prog_bar=True)
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize(("terminal", "width"), [(True, 80), (True, 160), (False, 80)])
def test_the_bar_is_one_line_and_there_is_none_in_a_file(terminal: bool, width: int, tmp_path: Path) -> None:
    output = StringIO()
    console = {"file": output, "width": width, "force_terminal": terminal, "color_system": None}
    bar = TrainingBar(console)
    limits = {"max_steps": 20, "limit_train_batches": 20, "limit_val_batches": 0}
    quiet = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False}
    trainer = Trainer(
        callbacks=[bar], accelerator="cpu", default_root_dir=tmp_path, log_every_n_steps=1, **limits, **quiet
    )
    trainer.fit(Logging())
    shown = output.getvalue()
    if not terminal:
        assert [line.split()[1] for line in shown.splitlines()] == [f"{step}/20" for step in range(2, 21, 2)]
        return
    last = [line for line in re.split(r"[\r\n]", shown) if "20/20" in line][-1]
    assert "\x1b[1A" not in shown, "no second line to go back over"
    assert "loss: 12345.0000" in last
    assert ("tokens_per_s: 12,345" in last) == (width == 160)
