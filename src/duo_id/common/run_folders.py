"""The folders of runs, sweeps and jobs: choose them, lock them, and record the composed config in them."""

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

from duo_id.common.console import print_error, set_missing_filename
from duo_id.common.errors import UserError
from duo_id.common.files import write_text
from duo_id.common.folders import check_links, first_process, folder_of, lock_folder, make_new_folder
from duo_id.common.mistakes import shell_quoted
from duo_id.common.record import SETTINGS
from duo_id.common.stopping import preemption

SWEEP = "DUO_ID_SWEEP"  # environment variable: identifies a sweep, as several may use the same folder
ERROR = "error.txt"  # in the folder of a failed job
HYDRA = ".hydra"  # in a run folder: the config that Hydra composed, and the overrides
RESULTS = (  # in a run folder: what a run started there anew would write over
    "heads/heads.json",
    "seed-*/heads/heads.json",
    "summary.json",
    "scores.jsonl",
    "results.json",
    "checkpoints/last.ckpt",
    "search.json",
)
_command_locks = ExitStack()  # locks held until the command ends


def command_folders() -> ExitStack:
    """Register the resolvers that choose folders for conf/.

    Returns:
        the locks on the command's folders, released when it is closed.
    """
    os.environ.setdefault(SWEEP, uuid.uuid4().hex)  # inherited by jobs in other processes
    _new_folder.cache_clear()
    OmegaConf.register_new_resolver("fresh_folder", _new_folder, replace=True)
    OmegaConf.register_new_resolver("run_folder", _run_folder, replace=True)
    return _command_locks


class FolderLock(Callback):
    """Locks the folder of a run or sweep, from before anything is written to it until the command ends."""

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Called by Hydra."""
        self._lock(config, "hydra.run.dir")

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Called by Hydra in the process that starts the jobs; a study with its own storage may have several."""
        self._lock(config, "hydra.sweep.dir", OmegaConf.select(config, "hydra.sweeper.storage") is not None)

    def _lock(self, config: DictConfig, override: str, shared: bool = False) -> None:
        if not first_process():
            return
        try:
            folder = folder_of(override, OmegaConf.select(config, override))
            if shared:
                check_links(folder)
            else:
                _command_locks.enter_context(lock_folder(folder, f"wait until it ends, or give another {override}"))
        except (UserError, OmegaConfBaseException, OSError) as error:  # Hydra would turn it into a warning
            set_missing_filename(error, OmegaConf.select(config, override, throw_on_resolution_failure=False))
            sys.exit(print_error(error))


@contextmanager
def locked_job_folder(config: DictConfig) -> Iterator[None]:
    """Lock the folder of a sweep's job, and record the composed config in the folder of a new run or job.

    Raises:
        UserError: another process works there, or another job of this sweep did, or a run with other settings has left
            its results there.
    """
    hydra = HydraConfig.get()
    if hydra.job.config_name == "data_gen" or not first_process():  # data_gen has no run folder
        yield
        return
    folder = Path(hydra.runtime.output_dir)
    with _locked_sweep_job(config, folder, hydra.job.num) if hydra.mode == RunMode.MULTIRUN else nullcontext():
        if not config.get("resume"):
            _check_replaces_nothing(config, folder)
            for name, contents in (("config", config), ("hydra", hydra), ("overrides", hydra.overrides.task)):
                write_text(folder / HYDRA / f"{name}.yaml", OmegaConf.to_yaml(contents))
        yield


@contextmanager
def _locked_sweep_job(config: DictConfig, folder: Path, number: int) -> Iterator[None]:
    """Lock the folder of a sweep's job; a preempted job that was requeued resumes from it."""
    sweep = os.environ.get(SWEEP)
    advice = "wait until it ends, or give another hydra.sweep.subdir"
    with lock_folder(folder, advice, sweep=sweep, job=number) as previous_holder:
        if previous_holder.get("sweep") == sweep:
            if previous_holder["job"] != number:
                raise UserError(
                    f"{folder}: job {previous_holder['job']} of this sweep uses this folder, and job {number} would "
                    "overwrite it: let hydra.sweep.subdir differ between jobs, as ${hydra.job.num} does"
                )
            if "resume" in config and preemption() is not None and (folder / SETTINGS).is_file():
                config.resume = str(folder)
        yield


def _check_replaces_nothing(config: DictConfig, folder: Path) -> None:
    """Refuse to start anew where results of other settings lie; the same settings replace them by the same results."""
    results = next((path for name in RESULTS for path in folder.glob(name)), None)
    before = folder / HYDRA / "config.yaml"
    if results is None or (before.is_file() and before.read_text("utf-8", "replace") == OmegaConf.to_yaml(config)):
        return
    override = "hydra.sweep.dir" if HydraConfig.get().mode == RunMode.MULTIRUN else "hydra.run.dir"
    resume = f", or {shell_quoted(f'resume={folder}')} to continue that run" if "resume" in config else ""
    raise UserError(
        f"{results} is of a run with other settings, and this one would replace it: give another {override}{resume}"
    )


@cache
def _new_folder(folder: str) -> str:
    """A new folder, the same one whenever this process asks for it."""
    if not first_process():
        return folder
    try:
        return str(make_new_folder(folder))
    except OSError as error:
        raise UserError(f"{folder} cannot be created ({error.strerror}): give another hydra.run.dir") from error


def _run_folder(resume: str | None, progress: str, folder: str) -> str:
    """The folder that a run writes to: a new one, or that of the run to resume, which contains the file `progress`."""
    if resume is None:
        return _new_folder(folder)
    if not isinstance(resume, str) or not resume.strip():
        raise UserError(f"resume={resume}: give the folder of a run")
    if not (Path(resume) / progress).is_file():
        raise UserError(f"resume={resume}: there is no {progress} to resume from; leave out resume to start anew")
    return resume
