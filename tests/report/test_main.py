"""`python -m duo_id.report`: where the page goes, and what is refused in one line."""

import re
import sys
from contextlib import chdir, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import pytest

from duo_id.common import cli
from duo_id.report import __main__ as report
from tests.evaluate.saved import a_pattern, line_up, save, saved_results
from tests.support.figures import blank_figures


def few(*names: str) -> dict[str, Any]:
    """Results of these heads at one sparsity, without baselines."""
    contenders = line_up(names, (0.5,), peers=False)
    return saved_results(2, ("json-lookup", "language"), (1000,), contenders, {name: a_pattern() for name in names})


def run_report(*arguments: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[int, str]:
    """The exit status and what is printed, with the working directory `folder`; the page's figures are blank."""
    monkeypatch.setattr(sys, "argv", ["report", *arguments])
    output = StringIO()
    with chdir(folder), redirect_stdout(output), blank_figures():
        try:
            cli.run_plain(report.main)
            status = 0
        except SystemExit as end:
            status = int(end.code or 0)
    return status, output.getvalue()


@pytest.fixture
def run(tmp_path: Path) -> Path:
    results = saved_results(1, ("json-lookup",), (1000,), line_up(peers=False)[:1], patterns={})
    return save(tmp_path / "run", results)


def test_help_has_the_settings_and_examples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for option in ("--help", "-h"):
        status, output = run_report("run", option, folder=tmp_path, monkeypatch=monkeypatch)
        assert status == 0
        assert output.startswith("Usage: duo-id report FOLDER... [KEY=VALUE ...]\n")
        assert "\n  duo-id report outputs/evaluate/DATE/TIME reference=saliency\n" in output
        assert re.search(r"^  out=<str> +the page; report.html in the first folder without it$", output, re.M)
    _, output = run_report("--open", folder=tmp_path, monkeypatch=monkeypatch)
    advice = "give settings as KEY=VALUE; see --help for examples, and "
    assert output.startswith(f"error: --open: there are no options, {advice}")
    assert output.count("\n") == 1


def test_the_page_goes_to_the_first_folder(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    status, output = run_report("run", "run/results.json", folder=run.parent, monkeypatch=monkeypatch)
    assert (status, output.split()) == (0, ["report:", "run/report.html"])
    assert "Tiny-4L" in (run / "report.html").read_text()
    assert sorted(path.name for path in run.iterdir()) == ["report.html", "results.json"]


def test_a_page_that_would_go_elsewhere_is_refused(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (run.parent / "precious").write_text("precious")
    (run / "report.html").symlink_to("../precious")
    for argument in ("run", "run/results.json"):
        status, output = run_report(argument, folder=run.parent, monkeypatch=monkeypatch)
        advice = "is a symbolic link out of run: remove it, or replace it by its target"
        assert (status, output) == (2, f"error: run/report.html {advice}\n")
    assert (run.parent / "precious").read_text() == "precious"
    status, _ = run_report("run", "out=run/report.html", folder=run.parent, monkeypatch=monkeypatch)
    assert status == 0, "what is typed may be a link"
    assert "Tiny-4L" in (run.parent / "precious").read_text()


def test_out_says_where(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    status, output = run_report("out=pages/a=b.html", "run", folder=run.parent, monkeypatch=monkeypatch)
    assert (status, output.split()) == (0, ["report:", "pages/a=b.html"])
    assert (run.parent / "pages" / "a=b.html").is_file()
    assert not (run / "report.html").exists()


def test_the_reference_of_comparisons_can_be_named(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(run.parent / "two", few("first", "second"))
    for arguments, name in (["two"], "first"), (["two", "reference=second"], "second"):
        status, _ = run_report(*arguments, folder=run.parent, monkeypatch=monkeypatch)
        assert status == 0
        assert f"Rise in answer loss minus that of {name} " in (run.parent / "two" / "report.html").read_text()
    status, output = run_report("two", "reference=third", folder=run.parent, monkeypatch=monkeypatch)
    assert (status, output.splitlines()) == (
        2, ["error: reference=third: no such heads in these results, choose among first, second"]
    )  # fmt: skip


def test_evaluations_without_the_reference_are_compared_with_their_first(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for split, names in ("test", ("first", "second")), ("development", ("third", "fourth")):
        save(run.parent / split, few(*names) | {"split": split})
    status, _ = run_report("test", "development", "reference=second", folder=run.parent, monkeypatch=monkeypatch)
    page = (run.parent / "test" / "report.html").read_text()
    assert status == 0
    assert "minus that of second " in page
    assert "minus that of third " in page
    assert "minus that of first " not in page


def test_folders_may_have_an_equals_sign(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run.rename(run.parent / "seed=1")
    status, _ = run_report("seed=1", folder=run.parent, monkeypatch=monkeypatch)
    assert status == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Missing argument 'FOLDER'; see --help for examples"),
        (["out=x.html"], "Missing argument 'FOLDER'"),
        (["run", "output=x.html"], "No such option: output (Possible options: out); see --help for examples"),
        (["nowhere"], "nowhere is missing"),
        (["run", "out=run"], "out=run is a folder: give a file, such as out=run/report.html"),
        (["."], "results.json is missing"),
        (["run", "out=run/results.json/x.html"], "File exists"),
    ],
)
def test_mistakes_are_one_line(arguments: list[str], message: str, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files_before = sorted(run.parent.rglob("*"))
    status, output = run_report(*arguments, folder=run.parent, monkeypatch=monkeypatch)
    assert status == 2
    (line,) = output.splitlines()
    assert line.startswith("error: ")
    assert message in line
    assert sorted(run.parent.rglob("*")) == files_before


def test_ctrl_c_leaves_nothing_behind(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr("duo_id.report.page.report", interrupted)
    status, output = run_report("run", folder=run.parent, monkeypatch=monkeypatch)
    assert (status, output) == (130, "interrupted\n")
    assert [path.name for path in run.iterdir()] == ["results.json"]


def test_folders_may_hold_an_equals_sign(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run.rename(run.parent / "lr=0.02")
    for argument in ("lr=0.02", "./lr=0.02"):
        status, output = run_report(argument, folder=run.parent, monkeypatch=monkeypatch)
        assert (status, output.split()) == (0, ["report:", "lr=0.02/report.html"])
    status, output = run_report("nosuch/lr=0.02", folder=run.parent, monkeypatch=monkeypatch)
    assert (status, output.partition(" is missing")[0]) == (2, "error: nosuch/lr=0.02")
