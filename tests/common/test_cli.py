"""What all commands share: how warnings and mistakes look, and that mistakes cost no second."""

import json
import shlex
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from duo_id import __main__ as script
from duo_id.common import cli
from duo_id.common.composing import compose
from duo_id.common.config import conf_dir
from duo_id.patterns.pattern import HeadPattern, TieWarning
from tests.support.commands import QUICK, run_command


def test_a_warning_is_one_line_however_often_it_is_given(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    pattern = HeadPattern(torch.zeros(4, 2), 4, 8)

    def command(_: list[str]) -> None:
        warnings.simplefilter("always")
        for _ in range(20):
            pattern.binarize(sparsity=0.5)
        pattern.binarize(sparsity=0.25)

    monkeypatch.setattr(sys, "argv", ["convert"])
    cli.run_plain(command)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" separates ")[0] for line in lines] == ["warning: sparsity=0.5", "warning: sparsity=0.25"]


STILL = ["method=duo", "method.lr=1e-12", "method.reg_weight=0", "trainer.max_steps=2", "comparison.random_masks=1"]


def test_ties_of_a_run_are_told_once(tmp_path: Path) -> None:
    """Gates that hardly move: the export and the comparison binarise them."""
    finished = run_command("train", *QUICK, *STILL, folder=tmp_path)
    assert finished.status == 0, finished.output
    warnings_shown = [line for line in finished.output.splitlines() if line.startswith("warning: sparsity=")]
    assert [line.split(",")[0] for line in warnings_shown] == [
        "warning: sparsity=0.25 separates heads with the same score: 6 of 6 have 1",
        "warning: sparsity=0.5 separates heads with the same score: 6 of 6 have 1",
    ]


def test_ties_of_gates_on_their_way_are_not_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    warning_files = set()

    def show(message: Warning, category: type[Warning], filename: str, *_: object) -> None:
        warning_files.update({Path(filename).name} if category is TieWarning else ())

    monkeypatch.setattr(cli, "_show_warnings", lambda: monkeypatch.setattr(warnings, "showwarning", show))
    assert run_command("train", *QUICK, *STILL, folder=tmp_path).status == 0
    assert "pattern.py" in warning_files, "a pattern warns as it is saved"
    assert warning_files.isdisjoint({"gate_training.py", "tracking.py"})


SLOW = ("torch", "transformers", "lightning", "datasets", "matplotlib", "pandas")
FAST = [
    *((command, "--help") for command in ("train", "evaluate", "benchmark", "data")),
    ("lm_eval", "--help"),
    ("report", "nosuch"),
    ("report", ". out="),
    ("train", "method.lrr=1"),
    ("train", "method.lr=abc"),
    ("train", "method.objective=nosuch"),
    ("train", "method.blend=nosuch"),
    ("train", "data.length_max=-1"),
    ("train", "data.task=typo"),
    ("train", "data.mixture.typo=1"),
    ("data", "out=DIR n=1 data.task=typo"),
    ("evaluate", "heads=nosuch"),
    ("train", "step.full_backend=nosuch"),
    ("train", "trainer.max_steps=0"),
    ("train", "experiment=nosuch"),
    ("evaluate", "heads=DIR sample=1"),
    ("evaluate", "heads=DIR samples=0"),
    ("evaluate", "heads=DIR tasks=needles"),
    ("benchmark", "step.memory=much"),
    ("data", "out=DIR n=-1"),
]


@pytest.mark.parametrize("config", ["train", "evaluate", "benchmark", "data_gen"])
def test_help_begins_with_examples_that_compose(config: str) -> None:
    header = OmegaConf.load(conf_dir() / f"{config}.yaml").hydra.help.header
    examples = [shlex.split(line, comments=True) for line in header.splitlines() if line.startswith("  duo-id")]
    assert examples
    for _, command, *arguments in examples:
        assert script.COMMANDS[command][0] == f"duo_id.{config.removesuffix('_gen')}"
        sweeps = "--multirun" in arguments
        compose(config, [argument.partition(",")[0] if sweeps else argument for argument in arguments[sweeps:]])
    assert max(map(len, header.splitlines())) <= 80


EACH = """
import atexit, json, os, runpy, sys
import hydra.main
import duo_id.common.cli

fast, slow = map(json.loads, sys.argv[1:])
for number, (command, arguments) in enumerate(fast):
    if pid := os.fork():
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
        continue
    os.mkdir(str(number))
    os.chdir(str(number))
    with open("output.txt", "w") as file:
        os.dup2(file.fileno(), 1)
    sys.argv = ["", *arguments.split()]
    atexit.register(lambda: print("loaded:", sorted(set(slow) & sys.modules.keys())))
    runpy.run_module(f"duo_id.{command}", run_name="__main__")
    sys.exit()
"""


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], tuple[int, str]]:
    """How each of `FAST` ends, in a process forked from one that has imported what all commands import: its status
    and what it printed, the modules of `SLOW` that it has loaded last."""
    folder = tmp_path_factory.mktemp("fast")
    command = [sys.executable, "-c", EACH, json.dumps(FAST), json.dumps(SLOW)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    outputs = [(folder / str(number) / "output.txt").read_text() for number in range(len(FAST))]
    return dict(zip(FAST, zip(map(int, done.stdout.split()), outputs, strict=True), strict=True))


@pytest.mark.parametrize(("command", "arguments"), FAST)
def test_help_and_mistakes_wait_for_no_large_import(
    command: str, arguments: str, ended: dict[tuple[str, str], tuple[int, str]]
) -> None:
    status, output = ended[command, arguments]
    assert (status, output.splitlines()[-1]) == (2 * (arguments != "--help"), "loaded: []"), output
