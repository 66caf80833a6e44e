"""A run that is killed or interrupted and resumed ends with the gates of an uninterrupted one, bit for bit."""

import sys
from pathlib import Path

import pytest

from tests.support.commands import shortcuts
from tests.support.processes import Started, start

OVERRIDES = [
    "model=tiny",
    "data=passkey",
    "data.length_min=400",
    "data.length_max=500",
    "data.num_passkeys=1",
    "data.passkey_words=2",
    "trainer.max_steps=12",
    "trainer.val_check_interval=5",
    "trainer.accelerator=cpu",
    "comparison.samples=1",
    "comparison.validation_samples=1",
    "comparison.random_masks=1",
    "checkpoint_seconds=0",
    "sparsity=[0.5]",
]

# Code that a run starts with, to be killed or interrupted at a given call, as late as possible.
COUNT = """
import os, signal, sys, torch
from duo_id.common import cli
from duo_id.train import __main__ as train
from duo_id.train import checkpoints
from duo_id.train.gate_training import GateTraining

def strike(owner, name, call, act):
    plain, calls = getattr(owner, name), [0]
    def wrapped(*args, **kwargs):
        calls[0] += 1
        if calls[0] == call:
            act(*args)
        return plain(*args, **kwargs)
    setattr(owner, name, wrapped)

kill = lambda *args: os.kill(os.getpid(), signal.SIGKILL)
send = lambda name: lambda *args: os.kill(os.getpid(), getattr(signal, name))
interrupt = send("SIGINT")

def half(checkpoint, path):
    torch.serialization.save(checkpoint, path)
    os.truncate(path, os.path.getsize(path) // 2)
    kill()
"""
EVENTS = {
    "undisturbed": "",
    "killed-in-a-step": "strike(GateTraining, 'training_step', 8, kill)",
    "killed-while-validating": "strike(GateTraining, 'validation_step', 1, kill)",
    "killed-while-saving": "strike(checkpoints.torch, 'save', 7, half)",
    "interrupted-in-a-step": "strike(GateTraining, 'training_step', 4, interrupt)",
    "interrupted-while-validating": "strike(GateTraining, 'validation_step', 2, interrupt)",
    "terminated-in-a-step": "strike(GateTraining, 'training_step', 4, send('SIGTERM'))",
    "terminated-while-validating": "strike(GateTraining, 'validation_step', 2, send('SIGTERM'))",
    "hung-up-in-a-step": "strike(GateTraining, 'training_step', 4, send('SIGHUP'))",
    "told-to-end-in-a-step": "strike(GateTraining, 'training_step', 4, send('SIGUSR1'))",
    "interrupted-twice": "strike(GateTraining, 'training_step', 4, lambda *args: (interrupt(), interrupt()))",
    "interrupted-twice-while-saving": (
        "strike(GateTraining, 'training_step', 4, interrupt)\nstrike(checkpoints.torch, 'save', 4, interrupt)"
    ),
    "terminated-and-hung-up": (
        "strike(GateTraining, 'training_step', 4, send('SIGTERM'))\n"
        "strike(checkpoints.torch, 'save', 4, send('SIGHUP'))"
    ),
}
STATUS = {"killed": -9, "interrupted": 130, "terminated": 143, "hung": 129, "told": 138}
INTERRUPTED = [event for event in EVENTS if event != "undisturbed" and not event.startswith("killed")]
DISTURBED = [event for event in EVENTS if event != "undisturbed"]


def train_under(event: str, *arguments: str) -> None:
    """The command, with the event in it."""
    sys.argv = ["train", *arguments]
    with shortcuts():
        exec(f"{COUNT}\n{event}\ncli.run('train', train.main)", {})


def start_run(event: str, *arguments: str, cwd: Path, file: str) -> Started:
    return start(train_under, event, *arguments, cwd=cwd, file=cwd / file)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    """Each event's run folder, its exit status and output, and those of the resumed run."""
    cwd = tmp_path_factory.mktemp("runs")
    started = {
        name: start_run(code, *OVERRIDES, f"hydra.run.dir={cwd / name}", cwd=cwd, file=f"{name}.txt")
        for name, code in EVENTS.items()
    }
    runs = {}
    for name, process in started.items():
        status, output = process.finish()
        runs[name] = {"folder": cwd / name, "status": status, "output": output}
    started = {name: start_run("", f"resume={cwd / name}", cwd=cwd, file=f"{name}-resumed.txt") for name in DISTURBED}
    for name, process in started.items():
        status, output = process.finish()
        runs[name] |= {"resumed_status": status, "resumed_output": output}
    return runs


def test_undisturbed_run_ends_well(runs: dict[str, dict]) -> None:
    assert runs["undisturbed"]["status"] == 0, runs["undisturbed"]["output"]


@pytest.mark.parametrize("event", DISTURBED)
def test_resumed_gates_are_the_same_bit_for_bit(event: str, runs: dict[str, dict]) -> None:
    run = runs[event]
    expected = 129 if event == "terminated-and-hung-up" else STATUS[event.partition("-")[0]]
    assert run["status"] == expected, run["output"]
    assert run["resumed_status"] == 0, run["resumed_output"]
    files = [folder / "heads" / "full_attention_heads.tsv" for folder in (run["folder"], runs["undisturbed"]["folder"])]
    assert files[0].read_text() == files[1].read_text()
    assert len(set(files[1].read_text().split())) > 3, "gates must have moved"


@pytest.mark.parametrize("event", DISTURBED)
def test_resumed_run_continues_where_the_other_stopped(event: str, runs: dict[str, dict]) -> None:
    steps = [line for line in runs[event]["resumed_output"].splitlines() if line.startswith("step ")]
    assert not any(line.startswith("step 2/12") for line in steps), "it started from the beginning"
    assert any(line.startswith("step 12/12") for line in steps)


@pytest.mark.parametrize("event", INTERRUPTED)
def test_interrupted_run_says_how_to_resume(event: str, runs: dict[str, dict]) -> None:
    run = runs[event]
    assert f"python -m duo_id.train resume={run['folder']}" in run["output"]
    assert "Traceback" not in run["output"]
    assert len([line for line in run["output"].splitlines() if line.startswith("stopped; to resume")]) == 1
    assert not (run["folder"] / "heads" / "heads.json").is_file() or run["resumed_status"] == 0


@pytest.mark.parametrize("event", DISTURBED)
def test_no_partial_file_remains(event: str, runs: dict[str, dict]) -> None:
    names = {path.name for path in (runs[event]["folder"] / "checkpoints").iterdir()}
    assert names == {"last.ckpt"}  # the resumed run removes the partial file that a killed one left
