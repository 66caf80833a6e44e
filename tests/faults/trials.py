"""What all trials share: undisturbed runs to compare with, what is checked after a fault, and what it comes to."""

import json
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import yaml
from PIL import Image

from tests.faults.cases import CASES, Case, make_inputs
from tests.faults.processes import Ended, launch, run_fresh

# What a trial may find; the table of a campaign has a column for each.
FINDINGS = ("traceback", "hang", "status", "silent", "lost", "unequal", "left over")


@dataclass(frozen=True)
class Undisturbed:
    """What a command comes to when nothing happens to it.

    Attributes:
        results: that must come out after every fault.
        looks: at its folder.
        seconds: without imports.
        bytes: of the files that it leaves.
        names: of these files, from the run folder on.
    """

    results: Any
    looks: int
    seconds: float
    bytes: int
    names: frozenset[str]


@dataclass
class Trial:
    """One trial: a function of its kind, command and seed.

    Attributes:
        kind: kills, disks or together.
        case: the command.
        seed: of its chances.
        faults: what happened: signals in their order, or another fault.
        told: how, for the reader.
        found: what is wrong, by the kinds of `FINDINGS`, each with what shows it.
        struck: whether something happened before the end of the command.
    """

    kind: str
    case: Case
    seed: int
    faults: list[str] = field(default_factory=list)
    told: list[str] = field(default_factory=list)
    found: list[tuple[str, str]] = field(default_factory=list)
    struck: bool = False

    @property
    def name(self) -> str:
        """What `--only` takes."""
        return f"{self.kind}/{self.case.name}/{self.seed}"

    @cached_property
    def chances(self) -> random.Random:
        """Decide everything."""
        return random.Random(self.name)

    def report(self, finding: str, shown: object) -> None:
        """Note that something is wrong."""
        assert finding in FINDINGS
        self.found.append((finding, str(shown)))

    def check_words(self, ended: Ended) -> None:
        """No traceback, no hanging process."""
        if re.search(r"Traceback|Exception ignored|Fatal Python error", ended.output):
            self.report("traceback", ended.output[-2000:])
        if ended.hangs:
            self.report("hang", ended.output[-500:])


class Bench:
    """A folder in which trials are made, with what their commands read.

    Args:
        root: of everything.
    """

    def __init__(self, root: Path) -> None:
        self.root, self.inputs = root, root / "inputs"
        self.inputs.mkdir(parents=True)
        make_inputs(self.inputs)
        self._known: dict[str, Undisturbed] = {}
        self._imports: float | None = None

    def folder(self, name: str) -> Path:
        """A new folder for a trial."""
        folder = self.root / name.replace("/", "-")
        folder.mkdir()
        return folder

    def go(self, case: Case, folder: Path, **options: Any) -> Ended:
        """Run a command in a folder, or go on with it, to its end."""
        return launch(case.function, *case.call(folder, self.inputs), folder=folder, **options).end()

    def undisturbed(self, case: Case) -> Undisturbed:
        """What a command comes to by itself."""
        if case.name == "report" and not (self.inputs / "evaluated").is_dir():
            self.undisturbed(CASES["evaluate"])
            (self.root / "evaluate-undisturbed" / "run").rename(self.inputs / "evaluated")
        if case.name not in self._known:
            folder = self.folder(f"{case.name}-undisturbed")
            ended, run = self.go(case, folder), folder / "run"
            assert ended.status == 0, ended.output
            files = [path for path in run.rglob("*") if path.is_file()]
            size = sum(path.stat().st_size for path in files)
            results = case.results(run)
            self._known[case.name] = Undisturbed(results, ended.looks, ended.seconds, size, names(run, case))
        return self._known[case.name]

    def imports(self) -> float:
        """The seconds that a new process spends on imports."""
        if self._imports is None:
            folder, case = self.folder("imports"), CASES["score"]
            ended = launch(run_fresh, *case.call(folder, self.inputs), folder=folder).end()
            self._imports = max(0.0, ended.seconds - self.undisturbed(case).seconds)
        return self._imports

    def check_end(self, trial: Trial, folder: Path, ended: Ended) -> None:
        """Check what the last command of a trial has left, to which nothing happened any more."""
        before, case = self.undisturbed(trial.case), trial.case
        trial.check_words(ended)
        if ended.status != 0:
            return trial.report("lost", f"going on ended with {ended.status}: {ended.output[-2000:]}")
        try:
            results = case.results(folder / "run")
        except Exception as error:
            return trial.report("lost", repr(error))
        if results != before.results:
            trial.report("unequal", f"{str(results)[:1000]}\nundisturbed: {str(before.results)[:1000]}")
        now = names(folder / "run", case)
        if left := sorted(now - before.names):
            trial.report("left over", left)
        if gone := sorted(before.names - now):
            trial.report("lost", gone)
        return None


def names(run: Path, case: Case) -> frozenset[str]:
    """The files in a run folder, from there on; a resumed run has more of metrics and of Hydra."""
    found = set()
    for path in run.rglob("*"):
        relative = path.relative_to(run)
        varies = any(relative.match(pattern) for pattern in case.varies)
        if path.is_file() and not varies and "resumed" not in relative.parts:
            found.add(re.sub(r"version_\d+", "version_N", str(relative)))
    return frozenset(found)


def unreadable(folder: Path) -> Iterator[str]:
    """The files in a folder that are there under their names and cannot be read."""
    for path in sorted(folder.rglob("*")):
        hidden = any(part.startswith(".") and part != ".hydra" for part in path.relative_to(folder).parts)
        if path.suffix in READERS and path.is_file() and not hidden and path.name not in UNREAD:
            try:
                READERS[path.suffix](path)
            except Exception as error:
                yield f"{path.relative_to(folder)}: {error!r}"[:300]


def _json_lines(path: Path) -> None:
    """All lines but the last, which its readers know how to leave out."""
    for line in path.read_text().splitlines()[:-1]:
        json.loads(line)


def _yaml(path: Path) -> None:
    assert yaml.safe_load(path.read_text()) is not None


def _page(path: Path) -> None:
    assert path.read_text().rstrip().endswith("</html>")


def _picture(path: Path) -> None:
    with Image.open(path) as picture:
        picture.load()


UNREAD = ("hparams.yaml", "metrics.csv")  # Lightning writes them in place; who reads metrics leaves out what is cut off
READERS = {
    ".json": lambda path: json.loads(path.read_text()),
    ".jsonl": _json_lines,
    ".yaml": _yaml,
    ".html": _page,
    ".png": _picture,
    ".csv": pd.read_csv,
    ".parquet": pd.read_parquet,
    ".ckpt": lambda path: torch.load(path, weights_only=True),
}
