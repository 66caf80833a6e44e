"""Names that mean something to rich, to matplotlib or to no encoding: shown as they are, after results are written."""

import io
import json
import re
from contextlib import redirect_stdout
from io import BytesIO, StringIO
from pathlib import Path

import pytest
from matplotlib.figure import Figure
from rich.console import Console

from duo_id.benchmark.step_tables import plot_steps, step_tables
from duo_id.benchmark.tables import results_tables
from duo_id.common import cli
from duo_id.common.figures import set_title
from duo_id.patterns.pattern import HeadPattern
from duo_id.report.tables import Cell, Grid, terminal_table
from duo_id.train import run as train
from duo_id.train.comparison import results_table
from tests.support.commands import QUICK, run_command

STRANGE = r"[/x] $\frac$ :smile:"
FEW = ["comparison.validation_samples=0", "comparison.random_masks=0", "comparison.samples=1", "sparsity=[0.5]"]
SOURCE = Path(__file__).parents[2] / "src" / "duo_id"


def shown(*things: object) -> str:
    """What the commands' console makes of something; lines are long, and folds are undone."""
    console = Console(emoji=False, file=StringIO(), width=200)
    console.print(*things)
    return " ".join(console.file.getvalue().split())  # type: ignore[attr-defined]


def test_a_run_of_strange_names_comes_to_its_end(tmp_path: Path) -> None:
    folder = tmp_path / "d[/x] $" / ":smile:é"
    names = [f"model.name='{STRANGE}'", f"hydra.run.dir='{folder}'"]
    finished = run_command(
        "train", *QUICK, *FEW, "repeats=2", "trainer.max_steps=1", *names, folder=tmp_path, figures=True
    )
    assert finished.status == 0, finished.output
    assert f"{STRANGE}: 1 held-out samples" in finished.output
    assert f"heads: {folder / 'heads'}" in finished.output
    assert json.loads((folder / "summary.json").read_text())["model"]["name"] == STRANGE
    assert (folder / "figures" / "gates.png").is_file()


def test_what_an_encoding_lacks_is_shown_by_its_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ascii_only = io.TextIOWrapper(BytesIO(), encoding="ascii", errors="strict", write_through=True)
    with redirect_stdout(ascii_only):
        cli._escape_unencodable()
        cli.console.print("α:", "\udc80")
    assert ascii_only.buffer.getvalue() == rb"\u03b1: \udc80" + b"\n"  # type: ignore[attr-defined]
    for name in ("run", "run_plain", "start_run"):
        called: list[str] = []
        monkeypatch.setattr(cli, "_escape_unencodable", lambda called=called: called.append("now") or 1 / 0)
        monkeypatch.setattr(cli.HydraConfig, "get", lambda: None)
        with pytest.raises(ZeroDivisionError):
            getattr(cli, name)(*{"run": ("train", print), "run_plain": (print,), "start_run": ({},)}[name])


def test_results_are_there_before_anything_is_said_of_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "results_table", lambda *_: 1 / 0)
    quick = [*QUICK, *FEW, "method=random", "trainer.max_steps=1"]
    with pytest.raises(ZeroDivisionError):
        run_command("train", *quick, folder=tmp_path)
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["results"]
    monkeypatch.undo()
    monkeypatch.setattr(HeadPattern, "plot", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run_command("train", *quick, f"hydra.run.dir={tmp_path / 'other'}", folder=tmp_path)
    assert (tmp_path / "other" / "summary.json").is_file()


def test_tables_show_names_letter_by_letter() -> None:
    step = {"step": "ours", "blend": "student", "context": 1, "peak_bytes": None, "floor_ms": 1.0, "status": "OOM"}
    results = {
        "task": "decode",
        "model": {"name": STRANGE},
        "device": STRANGE,
        "ceilings": {"flops": 1.0, "bandwidth": 1.0},
        "rows": [],
        "settings": {},
    }
    assert STRANGE in shown(results_table([], STRANGE))
    assert shown(*step_tables(results | {"rows": [step]})).count(STRANGE) == 2
    assert STRANGE in shown(*results_tables(results))
    grid = Grid([STRANGE], {section: [[Cell(STRANGE)]] for section in (STRANGE, "other")})
    assert shown(terminal_table(grid, STRANGE)).count(STRANGE) == 5
    plot_steps(results | {"rows": [step]}).savefig(BytesIO())


def test_titles_are_no_formulas() -> None:
    figure = Figure()
    set_title(figure, f"{STRANGE}\n\x00")
    assert figure.get_suptitle() == f"{STRANGE}\n?"
    figure.savefig(BytesIO())


def test_every_title_and_every_line_with_a_name_is_safe() -> None:
    """A title goes through `set_title`; a line that is filled in says what it does about markup."""
    for path in SOURCE.rglob("*.py"):
        text = path.read_text()
        assert ".suptitle(" not in text or path == SOURCE / "common" / "figures.py", path
        for line in re.findall(r'console\.print\(f".*', text):
            assert "markup=False" in line or "escape(" in line, f"{path.name}: {line}"
