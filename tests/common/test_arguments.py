"""Commands that are not Hydra's: what is a path and what a setting, and that their mistakes cost no second."""

import subprocess
import sys
from collections.abc import Sequence
from typing import Annotated

import pytest
from typer import Argument, Option

from duo_id.common.arguments import command
from duo_id.common.errors import UserError

SLOW = ("torch", "transformers", "lightning", "matplotlib", "pandas", "datasets")


@command("duo_id.some", "a b seed=1")
def main(
    paths: Annotated[list[str], Argument()],
    seed: Annotated[int, Option(min=0)] = 0,
    name: str | None = None,
) -> tuple[Sequence[str], int, str | None]:
    """Hand back what is given."""
    return paths, seed, name


@pytest.mark.parametrize(
    ("arguments", "parsed"),
    [
        (["a", "b"], (["a", "b"], 0, None)),
        (["seed=3", "a"], (["a"], 3, None)),
        (["a", "name=", "b"], (["a", "b"], 0, "")),
        (["a", "name=x=y --z"], (["a"], 0, "x=y --z")),
        (["./seed=3", "lr.2=1", "=1"], (["./seed=3", "lr.2=1", "=1"], 0, None)),
        (["a", f"name={300 * 'x'}"], (["a"], 0, 300 * "x")),  # longer than any file's name
    ],
)
def test_paths_and_settings_come_in_any_order(arguments: list[str], parsed: object) -> None:
    assert main(arguments) == parsed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a", "sede=1"], r"No such option: sede \(Possible options: seed\); see --help for examples"),
        (["a", "seed=1", "seed=1"], "seed=1: seed is given twice"),
        (["a", "seed=x"], "seed=x must be a whole number$"),
        (["a", "-x"], "-x: there are no options, give settings as KEY=VALUE"),
        ([], "Missing argument 'paths'; see --help"),
    ],
)
def test_mistakes_name_what_was_typed(arguments: list[str], message: str) -> None:
    with pytest.raises(UserError, match=f"^{message}") as error:
        main(arguments)
    assert "\n" not in str(error.value)


def test_a_missing_package_names_the_command() -> None:
    @command("duo_id.some")
    def missing() -> None:
        """Need a package that is not installed."""
        raise ModuleNotFoundError("No module named 'matplotlib'", name="matplotlib")

    with pytest.raises(UserError, match=r"^duo-id some needs matplotlib, .*: pip install 'duo_id\[eval\]'$"):
        missing([])


def test_help_shows_the_console_script(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    shown = capsys.readouterr().out
    assert shown.startswith("Usage: duo-id some ")
    assert "\n  duo-id some a b seed=1\n" in shown


@pytest.mark.parametrize("module", ["duo_id.report", "duo_id.convert"])
@pytest.mark.parametrize("arguments", [["--help"], ["abc=1"]])
def test_help_and_mistakes_wait_for_no_large_import(module: str, arguments: list[str]) -> None:
    code = (
        f"import atexit, runpy, sys; sys.argv = ['', *{arguments}]; "
        f"atexit.register(lambda: print('loaded:', sorted({set(SLOW)} & sys.modules.keys()))); "
        f"runpy.run_module({module!r}, run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.splitlines()[-1]) == (2 * (arguments != ["--help"]), "loaded: []")
