import re
from pathlib import Path

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
        global_step, log_every_n_steps, reads = 0, 5, 0

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
