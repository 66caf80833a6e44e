"""Run folders: a new one for each run, one process at a time in each, and who has it."""

import json
import os
import socket
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest

from duo_id import convert
from duo_id.common import folders
from duo_id.common.folders import LOCK, first_process, lock_folder, make_new_folder
from duo_id.patterns.formats.registry import FORMATS
from tests.support.commands import run_command

SHIPPED = "SmolLM2-135M-Instruct"


def elsewhere(block: Callable[[], object]) -> str:
    """What a block comes to in another process: its value, or the error that it raises."""

    def run() -> None:
        try:
            sender.send(str(block()))
        except Exception as error:
            sender.send(str(error))

    receiver, sender = (context := get_context("fork")).Pipe()
    process = context.Process(target=run)
    process.start()
    try:
        assert receiver.poll(60)
        return receiver.recv()
    finally:
        process.join()


def test_a_folder_of_the_same_second_is_another(tmp_path: Path) -> None:
    folders = [make_new_folder(tmp_path / "day" / "12-00-00") for _ in range(3)]
    assert [path.name for path in folders] == ["12-00-00", "12-00-00-2", "12-00-00-3"]
    assert all(path.is_dir() for path in folders)


def test_other_processes_of_a_run_take_no_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    for rank in ("RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID"):
        monkeypatch.delenv(rank, raising=False)
    assert first_process()
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert not first_process()
    monkeypatch.setenv("RANK", "0")
    assert first_process()


def test_a_folder_is_held_by_one_process_which_is_told(tmp_path: Path) -> None:
    def work() -> str:
        with lock_folder(tmp_path / "run", "give another", job=2) as previous:
            return json.dumps(previous)

    assert work() == "{}"
    with lock_folder(tmp_path / "run", "give another", job=1):
        message = elsewhere(work)
    host = socket.gethostname()
    assert message == f"{tmp_path / 'run'}: process {os.getpid()} on {host} is working in this folder: give another"
    assert json.loads(elsewhere(work)) == {"pid": os.getpid(), "host": host, "job": 1}


def test_a_killed_process_holds_nothing_and_neither_do_its_children(tmp_path: Path) -> None:
    """Such as workers that load samples, which outlive it for seconds."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        with lock_folder(tmp_path, "wait"):
            if os.fork() == 0:
                os.close(writing)
                os.read(reading, 1)  # until the test is over
            os._exit(0)
    os.waitpid(child, 0)
    with lock_folder(tmp_path, "wait") as previous:
        assert previous["pid"] == child
    os.close(writing)


def test_a_damaged_or_removed_lock_holds_nobody_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / LOCK).write_text("[")
    with lock_folder(tmp_path, "wait", keep=False) as previous:
        assert previous == {}
    assert not (tmp_path / LOCK).exists()
    with lock_folder(tmp_path / "new", "wait", keep=False):
        pass
    assert not (tmp_path / "new").exists()
    assert tmp_path.exists()
    lock, calls = folders.fcntl.lockf, []

    def removed_meanwhile(handle: int, how: int) -> None:
        lock(handle, how)
        calls.append(handle)
        if len(calls) == 1:
            (tmp_path / LOCK).unlink()

    monkeypatch.setattr(folders.fcntl, "lockf", removed_meanwhile)
    with lock_folder(tmp_path, "wait"):
        assert (tmp_path / LOCK).exists()
    assert len(calls) == 2


@pytest.mark.parametrize("stand_in", ["pipe", "folder", "link"])
def test_a_lock_that_is_no_file_is_named(stand_in: str, tmp_path: Path) -> None:
    lock = tmp_path / LOCK
    if stand_in == "pipe":
        os.mkfifo(lock)
    elif stand_in == "folder":
        lock.mkdir()
    else:
        (tmp_path / "beside").write_text("")
        lock.symlink_to("beside")
    error = run_command("train", f"hydra.run.dir={tmp_path}", folder=tmp_path, command=pytest.fail).error
    assert error == f"error: {lock} should be the lock file of this folder, but is no regular file: remove it"


FOLDERS = [
    name for name, form in FORMATS.items() if form.folder and name != "permuted-checkpoint"
]  # no checkpoint here


@pytest.mark.parametrize("name", FOLDERS)
def test_a_second_conversion_into_a_folder_is_told_who_has_it(name: str, tmp_path: Path) -> None:
    options: list[Any] = [SHIPPED, str(tmp_path / "made"), f"format={name}", "lossy=true", "sparsity=0.5"]
    with lock_folder(tmp_path / "made", "wait", keep=False):
        assert "is working in this folder: wait until it ends, or give another DST" in elsewhere(
            lambda: convert.main(options)
        )
    convert.main(options)
    assert not (tmp_path / "made" / LOCK).exists()
