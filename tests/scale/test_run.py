"""The command over two processes that Lightning starts: a lost one ends the run, and one process goes on with it."""

import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from duo_id.patterns.combining import normalized_ranks
from duo_id.patterns.pattern import HeadPattern
from duo_id.patterns.saved import load_pattern
from tests.scale.devices import environment
from tests.support.commands import Finished, run_command
from tests.support.processes import run_file, run_file_on_two, start

OVERRIDES = [
    "model=tiny",
    "data=passkey",
    "data.length_min=401",
    "data.length_max=501",
    "data.num_lengths=3",
    "data.num_passkeys=1",
    "data.passkey_words=2",
    "data.batch_size=2",
    "method.sink_size=4",
    "method.recent_size=60",
    "trainer.max_steps=5",
    "trainer.val_check_interval=4",
    "model.dtype=float32",
    "step.streaming_backend=blocked",
    "comparison.samples=1",
    "comparison.validation_samples=1",
    "comparison.random_masks=1",
    "checkpoint_seconds=0",
    "sparsity=[0.5]",
]
COMMAND = """
from duo_id.common import cli
from duo_id.train import __main__ as train
cli.run("train", train.main)
"""
LOST = """
import os, signal, time
from duo_id.common import cli
from duo_id.train import __main__ as train
from duo_id.train.gate_training import GateTraining

plain, calls = GateTraining.training_step, [0]

def step(self, *given):
    calls[0] += 1
    if calls[0] == int(os.environ["STEP"]):
        if os.environ.get("LOCAL_RANK", "0") == os.environ["RANK"]:
            open("lost", "w").write(str(time.time()))
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(float(os.environ["WAIT"]))
    return plain(self, *given)

GateTraining.training_step = step
cli.run("train", train.main)
"""
SIGNALLED = """
import os, signal
from duo_id.common import cli
from duo_id.train import __main__ as train
from duo_id.train.gate_training import GateTraining

plain, calls = GateTraining.training_step, [0]

def step(self, *given):
    calls[0] += 1
    if calls[0] == 3 and os.environ.get("LOCAL_RANK") == "1":
        signal.raise_signal(signal.SIGTERM)
    return plain(self, *given)

GateTraining.training_step = step
cli.run("train", train.main)
"""


@pytest.fixture(scope="module", params=["cpu", pytest.param("gpu", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def run_two(device: str, folder: Path, overrides: list[str], command: str = COMMAND, **variables: str) -> Finished:
    """The command over two processes, in `folder`/run, with more environment variables."""
    return run_on(run_file_on_two, device, folder, [*overrides, "trainer.devices=2"], command, **variables)


def run_on(
    run: Callable[..., None], device: str, folder: Path, overrides: list[str], command: str, **variables: str
) -> Finished:
    """The command by `run_file` or `run_file_on_two`, in `folder`/run, or resuming it."""
    (folder / "command.py").write_text(command)
    where = [] if "resume=run" in overrides else [f"trainer.accelerator={device}", "hydra.run.dir=run"]
    given = environment(device) | variables
    started = start(run, "command.py", *overrides, *where, cwd=folder, file=folder / "output.txt", **given)
    return Finished(*started.finish())


@pytest.fixture(scope="module")
def lost(device: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Finished, float]:
    """A run whose second process is killed in its fourth step: its folder, its end, and the seconds till then."""
    return lose(device, tmp_path_factory.mktemp("lost"))


def lose(device: str, folder: Path, wait: int = 0) -> tuple[Path, Finished, float]:
    """The first process waits `wait` seconds before it communicates with the one that is lost."""
    overrides = [*OVERRIDES, "step.sequence_parallel=2"]
    finished = run_two(device, folder, overrides, LOST, STEP="4", RANK="1", WAIT=str(wait))
    return folder, finished, time.time() - float((folder / "lost").read_text())


@pytest.fixture(scope="module")
def alone(device: str, tmp_path_factory: pytest.TempPathFactory) -> HeadPattern:
    folder = tmp_path_factory.mktemp("alone")
    assert run_command("train", *OVERRIDES, f"trainer.accelerator={device}", folder=folder).status == 0
    return load_pattern(folder / "run" / "heads")


def test_a_lost_process_ends_the_run_with_what_to_do(lost: tuple[Path, Finished, float]) -> None:
    folder, finished, seconds = lost
    assert finished.status not in (0, None), finished.output
    assert seconds < 60
    assert "Traceback" not in finished.output
    assert "python -m duo_id.train resume=" in finished.output
    assert "another process of this run has ended" in finished.output or "terminated with code -9" in finished.output
    assert {path.name for path in (folder / "run" / "checkpoints").iterdir()} == {"last.ckpt"}


def test_a_lost_process_is_named_where_the_others_only_wait(tmp_path: Path) -> None:
    """As NCCL does, which notices nothing for minutes; gloo's connections close at once."""
    _, finished, seconds = lose("cpu", tmp_path, wait=100)
    assert finished.status not in (0, None), finished.output
    assert seconds < 60
    assert "terminated with code -9" in finished.output
    assert "python -m duo_id.train resume=" in finished.output


def test_all_processes_end_by_the_signal_that_one_of_them_gets(device: str, tmp_path: Path) -> None:
    finished = run_two(device, tmp_path, OVERRIDES, SIGNALLED)
    assert finished.status == 143, finished.output
    assert "interrupted by SIGTERM" in finished.output
    assert "Traceback" not in finished.output
    assert (tmp_path / "run" / "checkpoints" / "last.ckpt").is_file()


def test_only_the_first_process_speaks_and_says_what_memory_is_needed(lost: tuple[Path, Finished, float]) -> None:
    lines = lost[1].output.splitlines()
    assert sum(line.startswith("step 1/5") for line in lines) == 1, lost[1].output
    (told,) = [line for line in lines if line.startswith("memory of a device with ")]
    assert " + activations " in told
    assert " + buffers " in told


def test_one_process_goes_on_with_it(lost: tuple[Path, Finished, float], alone: HeadPattern, device: str) -> None:
    folder = lost[0]
    resumed = run_command(
        "train", f"resume={folder / 'run'}", "trainer.devices=1", "step.sequence_parallel=1", folder=folder
    )
    assert resumed.status == 0, resumed.output
    assert "step 3/5" not in resumed.output, "it began anew"
    check_same(folder, alone, device)


def check_same(folder: Path, alone: HeadPattern, device: str) -> None:
    found = load_pattern(folder / "run" / "heads")
    close = 1e-5 if device == "cpu" else 1e-3
    assert (alone.scores - found.scores).abs().max() < close * alone.scores.abs().max()
    assert alone.scores.unique().numel() > 3, "gates that never moved prove nothing"


def test_one_process_then_two_then_one(alone: HeadPattern, device: str, tmp_path: Path) -> None:
    """Each is killed, the two after a single step; data parallel, where the lost ones above share tokens."""
    first = run_on(run_file, device, tmp_path, OVERRIDES, LOST, STEP="3", RANK="0", WAIT="0")
    assert first.status == -9, first.output
    second = run_two(device, tmp_path, ["resume=run"], LOST, STEP="2", RANK="1", WAIT="0")
    assert second.status not in (0, None), second.output
    assert "python -m duo_id.train resume=" in second.output
    saved = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    assert saved["global_step"] == 3, "two steps of the one, one of the two"
    last = run_command("train", "resume=run", "trainer.devices=1", folder=tmp_path)
    assert last.status == 0, last.output
    check_same(tmp_path, alone, device)


@pytest.mark.parametrize(
    "prior",
    [
        ["method@method.prior=reconstruction"],
        ["method@method.prior=replay_gradient", "method.prior.samples=2"],
        ["method@method.prior=saliency", "method.prior.kind=fisher", "method.prior.samples=2", "step.memory=least"],
    ],
    ids=str,
)
def test_processes_that_share_a_model_find_the_prior_of_gates(prior: list[str], device: str, tmp_path: Path) -> None:
    few = [*OVERRIDES, *prior, "method.prior_weight=1e6", "trainer.max_steps=1"]
    finished = run_two(device, tmp_path, few)
    assert finished.status == 0, finished.output
    found = load_pattern(tmp_path / "run").scores
    alone = run_command("train", *few, f"trainer.accelerator={device}", "hydra.run.dir=alone", folder=tmp_path)
    assert alone.status == 0, alone.output
    assert found.unique().numel() == found.numel()
    torch.testing.assert_close(found, load_pattern(tmp_path / "alone").scores, atol=1e-4, rtol=0)
    torch.testing.assert_close(
        found, normalized_ranks(found), atol=1e-4, rtol=0
    )  # the prior's, not those of gates after a step


@pytest.mark.parametrize(
    "given",
    [
        ["method=saliency", "step.sequence_parallel=2"],
        ["method=reconstruction", "step.sequence_parallel=2"],
        ["method=search"],
    ],
    ids=str,
)
def test_scores_that_processes_cannot_share_are_refused(given: list[str], tmp_path: Path) -> None:
    plain = [override for override in OVERRIDES if not override.startswith("method")]
    finished = run_two("cpu", tmp_path, [*plain, *given, "method.sink_size=4", "method.recent_size=60"])
    assert finished.status == 2, finished.output
    assert f"trainer.devices=2: {given[0]} only works on a single device; gate training works on" in finished.output
    assert "Traceback" not in finished.output


def test_a_prior_that_processes_cannot_share_is_refused(tmp_path: Path) -> None:
    finished = run_two("cpu", tmp_path, [*OVERRIDES, "method@method.prior=reconstruction", "step.sequence_parallel=2"])
    assert finished.status == 2, finished.output
    assert "trainer.devices=2: method@method.prior=reconstruction only works on a single device" in finished.output
    assert "method.prior=null does without" in finished.output
    assert "Traceback" not in finished.output
