"""The folders of runs, of sweeps and of their jobs: which they are, who works there, and what Hydra composed."""

import os
import sys
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import cache
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from duo_id.common.console import complain, name_folder
from duo_id.common.errors import UserError
from duo_id.common.files import write_text
from duo_id.common.folders import check_links, first_process, folder_of, fresh, held
from duo_id.common.record import SETTINGS
from duo_id.common.stopping import preemption

SWEEP = "DUO_ID_SWEEP"  # environment: tells the jobs of one sweep from those of another in the same folder
ERROR = "error.txt"  # a job that failed leaves it in its folder
HYDRA = ".hydra"  # in a run folder: what Hydra composed, and from which overrides
_command = ExitStack()  # holds the folder of the command that runs


def begin() -> ExitStack:
    """Let the folders that conf/ asks for be new ones.

    Returns:
        what holds the folder of the command until it is closed.
    """
    os.environ.setdefault(SWEEP, uuid.uuid4().hex)  # which jobs in other processes get too
    _new_folder.cache_clear()
    OmegaConf.register_new_resolver("fresh_folder", _new_folder, replace=True)
    OmegaConf.register_new_resolver("run_folder", _run_folder, replace=True)
    return _command


class Holding(Callback):
    """Holds the folder of a run or of a sweep before anything is written to it, until the command ends."""

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Called by Hydra."""
        self._hold(config, "hydra.run.dir")

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Called by Hydra, in the process that starts the jobs; many may work on a study that has its own storage."""
        self._hold(config, "hydra.sweep.dir", OmegaConf.select(config, "hydra.sweeper.storage") is not None)

    def _hold(self, config: DictConfig, override: str, shared: bool = False) -> None:
        if not first_process():
            return
        try:
            folder = folder_of(override, OmegaConf.select(config, override))
            if shared:
                check_links(folder)
            else:
                _command.enter_context(held(folder, f"wait until it ends, or give another {override}"))
        except (UserError, OmegaConfBaseException, OSError) as error:  # Hydra would make a warning of it
            name_folder(error, OmegaConf.select(config, override, throw_on_resolution_failure=False))
            sys.exit(complain(error))


@contextmanager
def holding_job(config: DictConfig) -> Iterator[None]:
    """Hold the folder of a sweep's job, and leave in the folder of a new run or job what Hydra composed.

    Raises:
        UserError: another process works there, or another job of this sweep did.
    """
    known = HydraConfig.get()
    if known.job.config_name == "data_gen" or not first_process():  # it has no run folder
        yield
        return
    folder = Path(known.runtime.output_dir)
    with _held_job(config, folder, known.job.num) if known.mode == RunMode.MULTIRUN else nullcontext():
        if not config.get("resume"):
            for name, kept in (("config", config), ("hydra", known), ("overrides", known.overrides.task)):
                write_text(folder / HYDRA / f"{name}.yaml", OmegaConf.to_yaml(kept))
        yield


@contextmanager
def _held_job(config: DictConfig, folder: Path, number: int) -> Iterator[None]:
    """Hold the folder of a sweep's job; one that was begun there and queued again goes on."""
    sweep = os.environ.get(SWEEP)
    advice = "wait until it ends, or give another hydra.sweep.subdir"
    with held(folder, advice, sweep=sweep, job=number) as before:
        if before.get("sweep") == sweep:
            if before["job"] != number:
                raise UserError(
                    f"{folder}: job {before['job']} of this sweep has this folder, and job {number} would write "
                    "over it: let hydra.sweep.subdir differ, as ${hydra.job.num} does"
                )
            if "resume" in config and preemption() is not None and (folder / SETTINGS).is_file():
                config.resume = str(folder)
        yield


@cache
def _new_folder(folder: str) -> str:
    """A folder that was not there before this process asked first."""
    return str(fresh(folder)) if first_process() else folder


def _run_folder(resume: str | None, progress: str, folder: str) -> str:
    """Where a run writes: a new folder, or that of the run it goes on with, whose `progress` is a file there."""
    if resume is None:
        return _new_folder(folder)
    if not isinstance(resume, str) or not resume.strip():
        raise UserError(f"resume={resume}: give the folder of a run")
    if not (Path(resume) / progress).is_file():
        raise UserError(f"resume={resume}: there is no {progress} to resume from; leave out resume to start anew")
    return resume
