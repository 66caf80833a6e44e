import re
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Trainer
from lightning.pytorch.demos.boring_classes import BoringModel
from torch import Tensor
from torch.utils.data import DataLoader

from duo_id.attention.functions import Backends
from duo_id.attention.interface import attached
from duo_id.models.gated_model import GatedModel
from duo_id.models.language_model import LanguageModel
from duo_id.models.loading import byte_tokenizer
from duo_id.train import progress
from duo_id.train.progress import TrainingBar, introduction
from duo_id.train.settings import TrainSettings
from tests.support.commands import QUICK, run_command, settings_of
from tests.support.tiny import tiny_model


def test_a_log_file_gets_a_line_for_each_tenth_of_the_run(tmp_path: Path) -> None:
    steps = 12
    quicker = ["comparison.samples=1", "comparison.random_masks=0", "comparison.validation_samples=0"]
    finished = run_command("train", *QUICK, *quicker, f"trainer.max_steps={steps}", folder=tmp_path)
    lines = [line for line in finished.output.splitlines() if line.startswith("step ")]
    assert [line.split("  ")[0] for line in lines] == [f"step {step}/{steps}" for step in (2, 4, 6, 8, 10, 12)]
    form = r"  loss [\d.]+  distill [\d.]+  length \d+  tokens_per_s [\d,]+  left: 0:00:\d\d"
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


class Slow(BoringModel):
    """Steps of 40 tokens, each half a minute by the clock of the tests."""

    def __init__(self, clock: list[float]) -> None:
        super().__init__()
        self.clock = clock

    def train_dataloader(self) -> Any:
        return DataLoader([{"input_ids": torch.zeros(40)}] * 20, collate_fn=lambda rows: self.batch(rows))

    def batch(self, rows: list[dict[str, Tensor]]) -> dict[str, Any]:
        return {"input_ids": rows[0]["input_ids"][None], "length": 40}

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.clock[0] += 30
        return self.layer(torch.zeros(1, 32)).sum()


@pytest.mark.parametrize("terminal", [True, False])
@pytest.mark.parametrize(("tokens", "left"), [(None, "9.5 min"), (80.0, "19 min")])
def test_the_first_step_on_a_cpu_says_how_long_training_takes(
    tokens: float | None, left: str, terminal: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, clock = StringIO(), [0.0]
    monkeypatch.setattr(progress.time, "perf_counter", lambda: clock[0])
    console = {"file": output, "width": 80, "force_terminal": terminal, "color_system": None}
    limits = {"max_steps": 20, "limit_train_batches": 20, "limit_val_batches": 0}
    quiet = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False}
    bar = TrainingBar(console, tokens)
    Trainer(callbacks=[bar], accelerator="cpu", default_root_dir=tmp_path, **limits, **quiet).fit(Slow(clock))
    shown = output.getvalue()
    assert shown.count(f"first step: 40 tokens in 30 s; about {left} for the other 19") == 1
    if not terminal:
        assert shown.splitlines()[1].endswith("left: 0:09:00")


@pytest.mark.parametrize(
    ("overrides", "sizes", "for_gpu"),
    [
        (["experiment=best"], "method=nested, 400 steps, samples of 1000 to 8000 tokens", True),
        (["trainer.max_steps=30"], "method=nested, 30 steps, samples of 256 to 384 tokens", False),
        (["method=saliency", "data.length_max=8192"], "method=saliency, scores, samples of 256 to 8192 tokens", False),
    ],
)
def test_the_first_line_says_what_runs(overrides: list[str], sizes: str, for_gpu: bool, tmp_path: Path) -> None:
    settings = settings_of("train", TrainSettings, *overrides, folder=tmp_path)
    model = LanguageModel(tiny_model("llama"), byte_tokenizer(), "tiny", "tiny", None, "random")
    with attached(model.model) as layers:
        gated_model = GatedModel(model, layers, settings.method.window, Backends())
        first, *others = introduction(gated_model, settings, tmp_path)
    assert first == f"tiny on cpu: 3 layers x 2 KV heads, {sizes}; folder: {tmp_path}"
    assert [line for line in others if "meant for a GPU" in line] == others
    assert bool(others) == for_gpu
