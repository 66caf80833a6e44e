"""Sweeps: the jobs of a sweep's folder side by side, by their differing overrides."""

from collections.abc import Sequence
from dataclasses import dataclass
from os.path import lexists
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import yaml

from duo_id.common.documents import checked, read_object, read_text
from duo_id.common.errors import UserError, one_line
from duo_id.common.run_folders import ERROR
from duo_id.common.tables import TextTable
from duo_id.patterns.pattern import HeadPattern
from duo_id.patterns.provenance import Summary
from duo_id.patterns.saved import load_pattern
from duo_id.patterns.sources import HEADS
from duo_id.report.tables import Cell, Grid, terminal_table

MARK = "multirun.yaml"  # Hydra leaves it in a sweep's folder
OPTIMISED = "optimization_results.yaml"  # left by an optimising sweeper
OVERRIDES = Path(".hydra") / "overrides.yaml"
LARGEST_YAML = 2**18  # bytes
RUNNING = "has not finished: it is still running, or was killed"
CAPTION = (
    "validation loss: of the identified masks on validation samples, the objective of a sweep; the other losses: on "
    "test samples, as in the table after training. Nats per token."
)


@dataclass(frozen=True)
class Job:
    """One job of a sweep.

    Attributes:
        name: of its folder, a number.
        overrides: its own and those of the whole sweep, by key.
        summary: as in summary.json; None: it has not finished.
        error: why it has not.
        pattern: the head pattern it identified.
    """

    name: str
    overrides: dict[str, str]
    summary: dict[str, Any] | None = None
    error: str = ""
    pattern: HeadPattern | None = None

    @property
    def losses(self) -> dict[float, float]:
        """Answer loss on test samples by sparsity; 0: full attention."""
        rows = (self.summary or {}).get("results") or []
        return {row["sparsity"]: row["answer_loss"] for row in rows if row["heads"] in ("full", "found")}

    @property
    def objective(self) -> float:
        """What the sweep minimised: the loss on validation samples; infinite for an unfinished job."""
        return float("inf" if (loss := (self.summary or {}).get("validation_loss")) is None else loss)


@dataclass(frozen=True)
class Sweep:
    """A sweep's folder.

    Attributes:
        name: the end of its path.
        jobs: in order.
        optimised: whether later jobs depended on earlier ones.
    """

    name: str
    jobs: tuple[Job, ...]
    optimised: bool

    @property
    def ended(self) -> list[Job]:
        """The finished jobs, the best first."""
        return sorted((job for job in self.jobs if job.summary), key=lambda job: job.objective)

    @property
    def varied(self) -> list[str]:
        """The keys of the overrides in which jobs differ."""
        keys = dict.fromkeys(key for job in self.jobs for key in job.overrides)
        return [key for key in keys if len({job.overrides.get(key) for job in self.jobs}) > 1]

    def setting(self, job: Job) -> str:
        """A job's differing overrides except the seed, as text."""
        differing = [f"{key}={job.overrides[key]}" for key in self.varied if key != "seed" and key in job.overrides]
        return ", ".join(differing) or self.name

    @property
    def settings(self) -> dict[str, list[Job]]:
        """The finished jobs by setting, across seeds; the best setting first."""
        by_setting: dict[str, list[Job]] = {}
        for job in self.ended:
            by_setting.setdefault(self.setting(job), []).append(job)
        return dict(sorted(by_setting.items(), key=lambda item: mean(job.objective for job in item[1])))


def is_sweep(folder: str | Path) -> bool:
    """Whether a folder is a sweep's."""
    return (Path(folder) / MARK).is_file()


def read_sweep(folder: str | Path) -> Sweep:
    """The jobs in a sweep's folder, failed and unfinished ones included.

    Raises:
        UserError: there are none, or one cannot be read.
    """
    folder = Path(folder)
    override_files = sorted(folder.glob(f"*/{OVERRIDES}"), key=lambda path: (len(path.parts[-3]), path.parts[-3]))
    if not override_files:
        raise UserError(f"{folder} is the folder of a sweep without jobs")
    jobs = tuple(_read_job(path.parents[1]) for path in override_files)
    name = "/".join(folder.resolve().parts[-2:])
    return Sweep(name, jobs, (folder / OPTIMISED).is_file())


def tables(sweep: Sweep) -> dict[str, TextTable]:
    """The `grids` for the terminal."""
    titles = {title: terminal_table(grid, f"{sweep.name}: {title}", "") for title, grid in grids(sweep).items()}
    if titles:
        next(reversed(titles.values())).caption = CAPTION
    return titles


def grids(sweep: Sweep) -> dict[str, Grid]:
    """Tables by title: finished jobs, the best first; settings over their seeds; failed jobs."""
    tables, varied = {}, sweep.varied
    sparsities = sorted({sparsity for job in sweep.ended for sparsity in job.losses})
    headings = ["full\nloss" if sparsity == 0 else f"loss,\n{100 * sparsity:.4g}%" for sparsity in sparsities]
    if sweep.ended:
        lines = [
            [
                Cell(job.name, float(job.name) if job.name.isdecimal() else None),
                *_override_cells(job, varied),
                *(_loss_cell([loss]) for loss in (job.objective, *map(job.losses.get, sparsities))),
            ]
            for job in sweep.ended
        ]
        tables["jobs"] = Grid(["job", *varied, "validation\nloss", *headings], {"": lines})
    if any(len(jobs) > 1 for jobs in sweep.settings.values()):
        lines = [
            [Cell(name), Cell(str(len(jobs)), len(jobs)), _loss_cell([job.objective for job in jobs])]
            + [_loss_cell([job.losses.get(sparsity) for job in jobs]) for sparsity in sparsities]
            for name, jobs in sweep.settings.items()
        ]
        tables["over the seeds"] = Grid(["setting", "jobs", "validation\nloss", *headings], {"": lines})
    failed = [job for job in sweep.jobs if not job.summary]
    if failed:
        lines = [[Cell(job.name), *_override_cells(job, varied), Cell(job.error)] for job in failed]
        tables["failed"] = Grid(["job", *varied, "why"], {"": lines})
    return tables


def _read_job(folder: Path) -> Job:
    try:
        override_list = yaml.safe_load(read_text(folder / OVERRIDES, LARGEST_YAML)) or []  # empty if killed early
        if not isinstance(override_list, list) or not all(isinstance(override, str) for override in override_list):
            raise UserError(f"{OVERRIDES} is not a list of overrides")
        overrides = dict(override.partition("=")[::2] for override in override_list)
        if not lexists(folder / "summary.json"):
            error = folder / ERROR
            return Job(folder.name, overrides, error=read_text(error) if error.is_file() else RUNNING)
        summary = read_object(folder / "summary.json")
        checked(Summary, summary, folder / "summary.json")
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        raise UserError(f"{folder} is not a job of a sweep: {one_line(error)}") from None
    pattern = load_pattern(folder) if lexists(folder / "heads" / HEADS) else None
    return Job(folder.name, overrides, summary, "", pattern)


def _override_cells(job: Job, varied: Sequence[str]) -> list[Cell]:
    return [_override_cell(job.overrides.get(key, "-")) for key in varied]


def _override_cell(text: str) -> Cell:
    """An override's value as typed, except for long numbers drawn by a sampler."""
    try:
        value = float(text)
    except ValueError:
        return Cell(text)
    return Cell(text if len(text) <= 8 else f"{value:.4g}", value)


def _loss_cell(values: Sequence[float | None]) -> Cell:
    """The mean and the standard deviation over jobs; a dash where any of them has no value."""
    finite = [value for value in values if value is not None and value < float("inf")]
    if not finite or len(finite) < len(values):
        return Cell("-", float("inf"))
    return Cell(f"{mean(finite):.3f}", mean(finite), spread=f"{stdev(finite):.3f}" if len(finite) > 1 else "")
