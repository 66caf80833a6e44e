"""Each notebook runs from its folder on what the repository ships, shows its figures, and says what is missing."""

import ast
import json
import os
import re
import time
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest

from tests.support.processes import run_module, start
from tests.support.smollm2 import SMOLLM2, save_narrow

nbformat = pytest.importorskip("nbformat")
NotebookResult = pytest.importorskip("nbmake.nb_result").NotebookResult
NotebookRun = pytest.importorskip("nbmake.nb_run").NotebookRun

FOLDER = Path(__file__).parents[1] / "notebooks"
FIGURES = {"find_heads": 1, "inspect_gates": 5, "compare_methods": 5, "deploy": 1, "head_anatomy": 2}
NARROW = {f'MODEL = "{SMOLLM2}"': "MODEL = {model!r}"}
SMALL = {  # in place of what notebooks load from the hub, and of what takes minutes
    "find_heads": NARROW
    | {
        "STEPS = 8": "STEPS = 1",
        "steps=STEPS, ": "steps=STEPS, lengths=(256, 280), ",
        'TASKS = ["needle-words", "language"]': 'TASKS = ["language"]',
        "lengths=1024, ": "lengths=512, ",
    },
    "deploy": NARROW | {"contexts = [512, 1024, 2048, 4096]": "contexts = [256, 512]"},
    "head_anatomy": NARROW,
}
notebooks = pytest.mark.parametrize("name", FIGURES)


@dataclass(frozen=True)
class Kernel:
    """A forked kernel with what Jupyter asks of a subprocess."""

    process: BaseProcess
    pid: int
    stdin: None = None
    stdout: None = None
    stderr: None = None

    def poll(self) -> int | None:
        return self.process.exitcode

    def wait(self) -> int | None:
        self.process.join()
        return self.process.exitcode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        self.process.kill()


def serve(command: list[str]) -> None:
    """The kernel that `python -m ipykernel_launcher ...` is, in a process group of its own."""
    os.setsid()
    run_module(*command[2:])


def forked(command: list[str], cwd: str, env: dict[str, str], **others: Any) -> Kernel:
    """In place of jupyter_client.launcher.launch_kernel: a kernel that has the modules already."""
    process = start(serve, command, cwd=Path(cwd), file=Path(os.devnull), **env).process
    assert process.pid is not None
    for _ in range(600):
        if os.getpgid(process.pid) == process.pid:  # signals go to its group, which must not be this process's
            return Kernel(process, process.pid)
        time.sleep(0.1)
    process.kill()
    raise TimeoutError(command)


def run(path: Path) -> NotebookResult:
    """The notebook executed in its folder, as `pytest --nbmake` does it."""
    return NotebookRun(path, default_timeout=240).execute()


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What stands in for SmolLM2."""
    return save_narrow(tmp_path_factory.mktemp("smollm2"))


def small(path: Path, narrow: Path, folder: Path) -> Path:
    """The notebook with the narrow model and a few steps, in a folder with what it reads."""
    text = path.read_text()
    for there, instead in SMALL[path.stem].items():
        instead = instead.format(model=str(narrow))
        assert text.count(json.dumps(there)[1:-1]) == 1
        text = text.replace(json.dumps(there)[1:-1], json.dumps(instead)[1:-1])
    copied = folder / "notebooks" / path.name
    copied.parent.mkdir()
    copied.write_text(text)
    return copied


def test_every_notebook_is_listed() -> None:
    assert {path.stem for path in FOLDER.glob("*.ipynb")} == FIGURES.keys()
    listed = (FOLDER.parent / "docs" / "notebooks.md").read_text()
    assert set(re.findall(r"`(\w+)\.ipynb`", listed)) == FIGURES.keys()


@notebooks
def test_notebooks_hold_their_outputs(name: str) -> None:
    cells = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4).cells
    counts = [cell.execution_count for cell in cells if cell.cell_type == "code"]
    assert counts == list(range(1, len(counts) + 1)), "execute it from top to bottom, and save it"
    outputs = [output for cell in cells for output in cell.get("outputs", [])]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == FIGURES[name]
    assert not [output for output in outputs if output.get("name") == "stderr" or output.output_type == "error"]


@notebooks
def test_notebooks_define_nothing_and_import_what_the_api_page_has(name: str) -> None:
    api = (FOLDER.parent / "docs" / "api.md").read_text()
    for cell in nbformat.read(FOLDER / f"{name}.ipynb", as_version=4).cells:
        code = "" if cell.cell_type != "code" else re.sub(r"^%.*$", "", cell.source, flags=re.MULTILINE)
        kinds = (ast.FunctionDef, ast.ClassDef, ast.Lambda)
        assert not any(isinstance(node, kinds) for node in ast.walk(ast.parse(code)))
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.ImportFrom) and str(node.module).startswith("duo_id"):
                for alias in node.names:
                    listed = rf"::: {node.module}(\.{alias.name}\n|\n +options:\n +members: \[.*\b{alias.name}\b)"
                    assert re.search(listed, api), f"{node.module}.{alias.name}"


@notebooks
def test_notebook_runs_and_shows_figures(
    name: str, narrow: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("jupyter_client.provisioning.local_provisioner.launch_kernel", forked)
    path = FOLDER / f"{name}.ipynb"
    result = run(small(path, narrow, tmp_path) if name in SMALL else path)
    assert result.error is None, result.error.trace
    outputs = [output for cell in result.nb.cells for output in cell.get("outputs", [])]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == FIGURES[name]


def test_without_results_a_notebook_says_so_in_one_line(tmp_path: Path) -> None:
    text = (FOLDER / "compare_methods.ipynb").read_text()
    assert text.count("data/evaluation\\") == 1, "the first cell names the results"
    path = tmp_path / "compare_methods.ipynb"
    path.write_text(text.replace("data/evaluation\\", "nowhere\\"))
    error = run(path).error
    assert error is not None
    shown = error.trace.partition("-" * 75 + "\n")[2].splitlines()[-1]
    assert (
        shown == "error: nowhere/results.json is missing: give the run folder of a finished evaluation"
        or shown.startswith("error: nowhere is missing: give the run folder of a finished evaluation")
    )
    assert "Traceback" not in error.trace
