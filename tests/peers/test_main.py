"""The command: what it asks of the worker, and its environment; pip and the worker are replaced."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from duo_id.common.errors import UserError
from duo_id.peers import environment
from duo_id.peers.__main__ import main
from duo_id.peers.choices import NEWEST, PRESSES, REFUSED, USUAL, chosen
from tests.peers.cases import make_items, write_run


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run, from whose folder the command is called."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    write_run(tmp_path / "run", tmp_path / "model", make_items())
    return tmp_path / "run"


@pytest.fixture
def executed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, list[str], dict[str, str]]]:
    """What would replace the process."""
    calls: list[Any] = []
    monkeypatch.setattr(os, "execve", lambda *call: calls.append(call))
    return calls


@pytest.fixture
def pip(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Stands for pip, with `commands` that were run; `status` and `error` are what it returns."""
    fake = SimpleNamespace(commands=[], status=0, error="")

    def call(command: list[object], **options: Any) -> SimpleNamespace:
        fake.commands.append([str(word) for word in command])
        return SimpleNamespace(returncode=fake.status, stderr=fake.error)

    def create(folder: Path, with_pip: bool) -> None:
        (folder / "bin").mkdir(parents=True, exist_ok=True)
        (folder / "bin" / "python").touch()
        (folder / "pyvenv.cfg").touch()

    monkeypatch.setattr(environment.subprocess, "run", call)
    monkeypatch.setattr(environment.venv, "create", create)
    return fake


def test_the_worker_gets_what_was_asked_for(
    run: Path,
    executed: list[tuple[str, list[str], dict[str, str]]],
    pip: SimpleNamespace,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PYTHONPATH", "elsewhere")
    main(["run", "install=true"])
    main(
        ["run", "presses=tova,kvzip", "sparsity=[0.25,0.5]", "samples=2", "tasks=words", "generate=false", "heads=true"]
    )
    (python, words, variables), (_, others, _) = executed
    assert python == words[0] == str(run.parent / ".venv-peers/bin/python")
    assert Path(words[-2]).name == "worker.py"
    assert "PYTHONPATH" not in variables
    asked = json.loads(words[-1])
    assert asked["presses"] == list(USUAL)
    assert {value for key, value in asked.items() if key not in ("folder", "presses", "heads")} == {None}
    assert json.loads(others[-1]) == {
        "folder": "run",
        "presses": ["tova", "kvzip"],
        "heads": True,
        "sparsity": [0.25, 0.5],
        "cache": None,
        "samples": 2,
        "tasks": ["words"],
        "generate": False,
        "device": None,
    }


def test_groups_stand_for_their_presses() -> None:
    assert chosen("newest,snapkv,kvgrad") == [*NEWEST, "snapkv"]
    assert chosen("all") == list(PRESSES)
    assert len(set(PRESSES)) == len(PRESSES) > len({*USUAL, *NEWEST}) == len(USUAL) + len(NEWEST)
    assert not {*PRESSES} & {*REFUSED}


def test_the_environment_is_installed_once(
    run: Path, executed: list[Any], pip: SimpleNamespace, capsys: pytest.CaptureFixture[str]
) -> None:
    pip.status, pip.error = 1, "ERROR: No matching distribution\nnotice: a new release of pip\n"
    with pytest.raises(UserError, match=r"environment=\.venv-peers: pip cannot .*: No matching distribution$"):
        main(["run", "install=true"])
    pip.status = 0
    for _ in range(2):
        main(["run", "install=true", "presses=tova,tova"])
    assert json.loads(executed[0][1][-1])["presses"] == ["tova"]
    assert len(executed) == len(pip.commands) == 2
    assert pip.commands[0][-2:] == ["-r", str(environment.REQUIREMENTS)]
    assert capsys.readouterr().out.count("this takes some minutes, once") == 2


def test_a_python_without_pip_is_named(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def create(folder: Path, with_pip: bool) -> None:
        raise subprocess.CalledProcessError(1, ["python", "-m", "ensurepip"])

    monkeypatch.setattr(environment.venv, "create", create)
    with pytest.raises(UserError, match=r"environment=\.venv-peers cannot be created: this Python cannot install pip"):
        main(["run", "install=true"])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "Missing argument 'RUN'"),
        (["run"], "environment=.venv-peers does not exist, install=true creates it: kvpress 0.5.5 needs"),
        (["run", "environment=run", "install=true"], "environment=run exists and is no virtual environment"),
        (["run", "presses=snapvk"], "presses=snapvk: choose among snapkv, tova"),
        (["run", "presses=snapvk"], "did you mean snapkv?"),
        (["run", "presses=snapkv,newst"], "presses=newst: choose among"),
        (["run", "presses=all,kvzap"], "presses=kvzap: kvzap needs weights trained for the model, from the hub; leave"),
        (["run", "presses=lu-kv"], "did you mean lukv?"),
        (["run", "presses="], "presses=: choose among"),
        (["run", "ratio=0.5"], "ratio"),
        (["run", "samples=few"], "samples=few must be a whole number"),
        (["run", "samples=0"], "samples=0 must be at least 1"),
        (["run", "generate=perhaps"], "generate=perhaps: choose one of true, false"),
        (["run", "sparsity=much"], "sparsity=much: give numbers"),
        (["run", "cache=0.5,x"], "cache=0.5,x: give numbers, such as cache=0.25,0.5"),
        (["nowhere"], "nowhere holds no samples.jsonl"),
    ],
)
def test_mistakes_are_one_line(run: Path, executed: list[Any], arguments: list[str], words: str) -> None:
    with pytest.raises(UserError) as error:
        main(arguments)
    assert words in str(error.value)
    assert "\n" not in str(error.value)
    assert not executed


def test_the_worker_names_what_its_environment_lacks() -> None:
    """Run in this environment, which has no kvpress."""
    worker = Path(environment.__file__).with_name("worker.py")
    command = [sys.executable, "-P", str(worker), json.dumps({})]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"error: environment={sys.prefix} has no kvpress: install=true installs it\n"
