"""The console script, and what `import duo_id` shows."""

import sys
from pathlib import Path

import pytest

import duo_id
from duo_id import __main__ as script

PACKAGE = Path(duo_id.__file__).parent


def test_the_public_names_are_listed_and_are_there() -> None:
    names = dir(duo_id)
    assert names == sorted(names) == duo_id.__all__
    packages = {path.name for path in PACKAGE.iterdir() if path.is_dir()}
    assert not packages & set(names), "a public function with the name of a package hides it"
    for name in names:
        assert getattr(duo_id, name).__doc__, name


def call(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["duo-id", *arguments])
    script.main()


def test_alone_it_lists_the_commands(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    call(monkeypatch)
    listed = capsys.readouterr().out
    assert [line.split()[0] for line in listed.splitlines()[2:]] == list(script.COMMANDS)
    assert all(len(line) <= 80 for line in listed.splitlines())


def test_it_tells_its_version(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    call(monkeypatch, "--version")
    assert capsys.readouterr().out == f"duo_id {duo_id.__version__}\n"


def test_commands_that_do_not_exist(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        call(monkeypatch, "evalute")
    assert capsys.readouterr().err.endswith("did you mean evaluate?\n")


@pytest.mark.parametrize("command", script.COMMANDS)
def test_every_command_has_a_module(command: str) -> None:
    module = script.COMMANDS[command][0].removeprefix("duo_id.")
    assert (PACKAGE / f"{module}.py").exists() or (PACKAGE / module / "__main__.py").exists()


def test_a_command_gets_its_arguments(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        call(monkeypatch, "convert", "--help")
    assert "duo-id convert SRC DST" in capsys.readouterr().out
