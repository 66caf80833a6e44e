"""Signals that ask for the end: what they do to the commands, and who else listens to them."""

import builtins
import os
import signal
import sys
import termios
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from omegaconf import DictConfig

from duo_id.common import cli, stopping
from duo_id.patterns.saved import load_pattern
from duo_id.train.gate_training import GateTraining
from tests.support.commands import QUICK, run_command
from tests.support.processes import run_file, run_module, start

NAMES = ["SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1"]
FEW = ["comparison.validation_samples=0", "comparison.random_masks=0", "comparison.samples=1"]


def forked(block: Callable[[], object]) -> int:
    """The exit status of a block in a process of its own; 0 if it came to its end."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            block()
            status = 0
        except SystemExit as end:
            status = int(end.code or 0)
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.parametrize("name", NAMES)
def test_a_command_that_is_told_to_end_says_so_and_ends_with_its_status(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    number = signal.Signals[name]
    handlers = [signal.getsignal(handled) for handled in stopping.SIGNALS]
    says = "interrupted" if name == "SIGINT" else f"interrupted by {name}"

    def told(_: object) -> None:
        signal.raise_signal(number)
        pytest.fail("it went on")

    finished = run_command("train", folder=tmp_path, command=told)
    assert (finished.status, finished.output.splitlines()) == (128 + number, [says])
    monkeypatch.setattr(sys, "argv", ["convert"])
    with pytest.raises(SystemExit) as end:
        cli.run_plain(told)
    assert (end.value.code, capsys.readouterr().out) == (128 + number, f"{says}\n")
    assert [signal.getsignal(handled) for handled in stopping.SIGNALS] == handlers


def test_a_sweep_ends_at_the_job_that_is_told_to(tmp_path: Path) -> None:
    jobs = []

    def told(config: DictConfig) -> float:
        jobs.append(config.seed)
        signal.raise_signal(signal.SIGTERM)
        return 0.0

    sweep = ["--multirun", "seed=0,1", f"hydra.sweep.dir={tmp_path / 'sweep'}"]
    assert run_command("train", *sweep, folder=tmp_path, command=told).status == 143
    assert jobs == [0]


def test_of_several_seeds_those_that_are_done_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step, seeds = GateTraining.training_step, []

    def told(self: GateTraining, *args: object) -> object:
        seeds.append(self)
        if len(seeds) == 4:  # the last step of the second seed
            signal.raise_signal(signal.SIGTERM)
        return step(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(GateTraining, "training_step", told)
        finished = run_command("train", *QUICK, *FEW, "repeats=2", folder=tmp_path)
    assert finished.status == 143, finished.output
    assert f"stopped; to resume: python -m duo_id.train resume={tmp_path / 'run'}" in finished.output
    assert (tmp_path / "run" / "seed-0" / "heads" / "heads.json").is_file()
    assert not (tmp_path / "run" / "heads").exists()
    resumed = run_command("train", f"resume={tmp_path / 'run'}", folder=tmp_path)
    assert resumed.status == 0, resumed.output
    assert len(seeds) == 4, "nothing is trained again"
    assert load_pattern(tmp_path / "run").provenance


def test_what_nohup_ignores_stays_ignored() -> None:
    handler = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stopping.stoppable():
            signal.raise_signal(signal.SIGHUP)
            undo = stopping.listen(lambda number: pytest.fail("nohup has no effect"))
            signal.raise_signal(signal.SIGHUP)
            undo()
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, handler)


def test_the_end_is_not_disturbed_by_a_second_signal_and_a_third_is_final() -> None:
    def ending(signals: int) -> None:
        with stopping.stoppable():
            try:
                signal.raise_signal(signal.SIGTERM)
            except KeyboardInterrupt:
                for _ in range(signals):
                    signal.raise_signal(signal.SIGINT)

    assert forked(lambda: ending(1)) == 0
    assert forked(lambda: ending(2)) == 130
    with stopping.stoppable(), pytest.raises(KeyboardInterrupt):  # counted anew
        signal.raise_signal(signal.SIGINT)


def test_while_it_is_noted_what_is_at_work_goes_on_and_the_next_one_ends_it() -> None:
    noted: list[int] = []
    with stopping.stoppable():
        stopping.listen(noted.append)
        signal.raise_signal(signal.SIGUSR1)
        assert noted == [signal.SIGUSR1]
        with pytest.raises(stopping.Stopped) as stopped:
            signal.raise_signal(signal.SIGHUP)
    assert stopping.status_of(stopped.value) == 129
    assert noted == [signal.SIGUSR1]


def test_after_a_hangup_nothing_is_written_to_a_terminal_that_is_gone(tmp_path: Path) -> None:
    terminal, replica = os.openpty()
    os.close(terminal)
    with pytest.raises(termios.error):
        termios.tcgetattr(replica)

    def printing(hangup: bool) -> None:
        os.dup2(replica, 1)
        with stopping.stoppable():
            try:
                if hangup:
                    signal.raise_signal(signal.SIGHUP)
            except KeyboardInterrupt:
                pass
            os.write(1, b"to go on: ...")

    assert forked(lambda: printing(hangup=True)) == 0
    assert forked(lambda: printing(hangup=False)) == 1
    os.close(replica)


ENTRIES = [*(f"duo_id.{name}" for name in "train evaluate report convert benchmark lm_eval".split()), "write.py"]


def importing(entry: str) -> None:
    """A command that gets Ctrl-C at its first import after those that take no time."""
    plain = builtins.__import__

    def interrupted(name: str, values: dict[str, Any] | None = None, *args: Any, **kwargs: Any) -> Any:
        is_main = values is not None and values.get("__name__") == "__main__" and "__file__" in values
        if is_main and (name != "duo_id.common" or "stopping" not in args[1]):
            os.kill(os.getpid(), signal.SIGINT)
        return plain(name, values, *args, **kwargs)

    for name in (entry, f"{entry}.__main__"):
        sys.modules.pop(name, None)  # which the first process has imported
    builtins.__import__ = interrupted
    if entry == "write.py":
        run_file(str(Path(__file__).parents[2] / "data_gen" / entry))
    else:
        run_module(entry)


def test_ctrl_c_while_modules_are_imported_leaves_no_traceback(tmp_path: Path) -> None:
    started = {entry: start(importing, entry, cwd=tmp_path, file=tmp_path / f"{entry}.txt") for entry in ENTRIES}
    assert {entry: process.finish() for entry, process in started.items()} == dict.fromkeys(ENTRIES, (-2, ""))


def test_a_signal_while_an_object_is_done_away_with_is_not_lost() -> None:
    class Struck:
        def __del__(self) -> None:
            signal.raise_signal(signal.SIGTERM)

    def struck() -> None:
        Struck()
        signal.pause()

    with stopping.stoppable(), pytest.raises(stopping.Stopped) as stopped:
        struck()
    assert stopped.value.number == signal.SIGTERM
