"""The benchmark over two processes: what it measures, and that one of them which runs out of memory ends the run."""

import json
import platform
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from duo_id.benchmark.settings import BenchmarkSettings
from duo_id.common.config import plain
from duo_id.distributed.ranks import Ranks
from duo_id.models.loading import meta_model
from duo_id.step.devices import calculated_costs, fit_memory
from tests.scale.devices import environment
from tests.support.commands import Finished, settings_of
from tests.support.processes import run_file, start

OVERRIDES = [
    "task=train_step",
    "model=tiny",
    "trainer.devices=2",
    "step.sequence_parallel=2",
    "context=[61,90]",  # an odd one, and one that is too much
    "blend=[teacher]",
    "sink_size=4",
    "recent_size=8",
    "repeats=2",
    "profile=true",
    "compare=alone",
    "step.streaming_backend=blocked",
    "compile=false",
    "model.dtype=float32",
    "hydra.run.dir=run",
]
FULL = """
import os, time
import torch
from duo_id.benchmark import __main__ as benchmark
from duo_id.common import cli
from duo_id.step.distillation import Distillation

plain = Distillation.loss

def loss(self, alpha, batch, teacher=None):
    if os.environ.get("LOCAL_RANK") == "1" and batch["input_ids"].shape[1] == 45:
        open("full", "w").write(str(time.time()))
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    return plain(self, alpha, batch, teacher)

Distillation.loss = loss
cli.run("benchmark", benchmark.main)
"""


@pytest.fixture(scope="module", params=["cpu", pytest.param("gpu", marks=pytest.mark.gpu)])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Finished, float]:
    """A run whose second length is too much for its second process: its folder, its end, and the seconds till then."""
    folder = tmp_path_factory.mktemp("benchmark")
    (folder / "command.py").write_text(FULL)
    rows = [{"step": "ours", "status": "ok", "blend": "teacher", "context": n, "tokens_per_s": 100.0} for n in (61, 90)]
    (folder / "alone").mkdir()
    device = torch.cuda.get_device_name() if request.param == "gpu" else platform.processor() or "CPU"
    one = [*OVERRIDES, "trainer.devices=1", "step.sequence_parallel=1"]
    settings = plain(settings_of("benchmark", BenchmarkSettings, *one, folder=folder))
    alone = {"rows": rows, "model": {"name": "tiny"}, "device": device, "settings": settings}
    (folder / "alone" / "results.json").write_text(json.dumps(alone))
    started = start(
        run_file,
        "command.py",
        *OVERRIDES,
        f"trainer.accelerator={request.param}",
        cwd=folder,
        file=folder / "output.txt",
        **environment(request.param),
    )
    finished = Finished(*started.finish())
    assert (folder / "full").is_file(), finished.output
    return folder, finished, time.time() - float((folder / "full").read_text())


def test_a_process_without_memory_ends_the_run(run: tuple[Path, Finished, float]) -> None:
    _, finished, seconds = run
    assert finished.status not in (0, None), finished.output
    assert seconds < 60
    assert "Traceback" not in finished.output
    assert "process 1 of 2 ran out of device memory: use step.memory=least" in " ".join(finished.output.split())


def test_what_was_measured_before_is_kept(run: tuple[Path, Finished, float]) -> None:
    results: dict[str, Any] = json.loads((run[0] / "run" / "results.json").read_text())
    shared = [results[key] for key in ("devices", "data_groups", "sequence_parallel", "sharded")]
    assert shared == [2, 1, 2, True]
    (row,) = results["rows"]
    assert (row["step"], row["context"], row["status"]) == ("ours", 61, "ok")
    assert row["tokens_per_s"] == pytest.approx(61 / row["ms"] * 1e3), "of all processes together"
    assert row["efficiency"] == pytest.approx(row["tokens_per_s"] / 2 / 100)
    elsewhere = [*OVERRIDES, "hydra.run.dir=elsewhere"]
    settings, ranks = settings_of("benchmark", BenchmarkSettings, *elsewhere, folder=run[0]), Ranks(1, 2, sharded=True)
    costs = calculated_costs(meta_model(settings.model, torch.float32), ranks, torch.device("cpu"), True)
    plan = str(fit_memory(settings.step, costs, 31, None)[1])
    if row["peak_bytes"] is not None:  # a GPU's also has libraries, and what it has free
        plan, row["plan"] = (told.partition(" of 3 layers")[2] for told in (plan, row["plan"]))
    assert row["plan"] == plan, "as before the weights are loaded"
    assert row["profile"]["communication"] > 0
    if row["peak_bytes"] is not None:  # on a GPU, whose kernels are seen
        found = row["communication"]
        assert 0 < found["all_to_all"] <= found["all"] <= found["step"]
        assert 0 <= found["exposed"] <= found["all"]
    traces = [path.name for path in (run[0] / "run").glob("trace*.json")]
    assert traces == ["trace_ours_teacher_61.json"], "of the first process alone"


def test_only_the_first_process_speaks(run: tuple[Path, Finished, float]) -> None:
    lines = run[1].output.splitlines()
    rows = [line for line in lines if line.startswith("ours, teacher blend, 61 tokens:") and "left:" not in line]
    assert len(rows) == 1
    assert sum("memory of a device" in line for line in lines) == 1
