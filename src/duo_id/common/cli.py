"""What the commands share: compose the config with Hydra, and show a user's mistake as one line."""

import logging
import math
import os
import subprocess
import sys
import traceback
import uuid
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import cache
from importlib.metadata import version
from io import TextIOWrapper
from pathlib import Path
from typing import Any, NoReturn

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console
from rich.markup import escape

from duo_id import __version__
from duo_id.common.config import conf_dir
from duo_id.common.documents import printable
from duo_id.common.errors import UserError
from duo_id.common.files import write_text
from duo_id.common.folders import check_links, first_process, folder_of, fresh, held
from duo_id.common.mistakes import as_typed, explained, literal, no_choice
from duo_id.common.record import SETTINGS
from duo_id.common.resuming import open_to_any, resumed
from duo_id.common.stopping import describe_interrupt, preemption, status_of, stoppable

console = Console(emoji=False)
SWEEP = "DUO_ID_SWEEP"  # environment: tells the jobs of one sweep from those of another in the same folder
ERROR = "error.txt"  # a job that failed leaves it in its folder
HYDRA = ".hydra"  # in a run folder: what Hydra composed, and from which overrides
_folder = ExitStack()  # holds that of the command that runs


@stoppable()
def run(name: str, command: Callable[[DictConfig], object]) -> None:
    """Compose conf/`name`.yaml with the command line's overrides and call `command` on it.

    A mistake of the user ends the process with one line and status 2, Ctrl-C with status 130, and another signal that
    asks for the end with 128 and its number.
    """
    _print_anything()
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra hands exceptions on, to be shown here
    os.environ.setdefault(SWEEP, uuid.uuid4().hex)  # which jobs in other processes get too
    _new_folder.cache_clear()
    OmegaConf.register_new_resolver("fresh_folder", _new_folder, replace=True)
    OmegaConf.register_new_resolver("run_folder", _run_folder, replace=True)
    sys.argv[1:] = open_to_any(sys.argv[1:])
    composed, status = False, 0

    def task(config: DictConfig) -> object:
        nonlocal composed, status
        composed, ours = True, False
        try:
            with _holding_job(config):
                ours = True
                return command(config)
        except Exception as error:
            expected = isinstance(error, UserError | HydraException | OmegaConfBaseException | OSError)
            _name(error, HydraConfig.get().runtime.output_dir)
            if HydraConfig.get().mode != RunMode.MULTIRUN:
                if expected:
                    exit_process(_complain(error))  # Hydra would print more
                if is_distributed():
                    traceback.print_exc()
                    exit_process(1)
                raise
            status = _note_failure(error, expected, ours)  # the other jobs of a sweep go on
            return math.nan

    try:
        with _folder:
            hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name=name)(task)()
        sys.exit(status)
    except (UserError, HydraException, OmegaConfBaseException, OSError) as error:
        sys.exit(_complain(error))
    except (ValueError, TypeError, AttributeError) as error:  # Hydra's own, as on trainer=null or model=[[a]]
        if composed:
            raise
        groups = [text for text in sys.argv[1:] if (conf_dir() / text.strip("+~").partition("=")[0]).is_dir()]
        given = [text for text in groups if no_choice(text)] or sys.argv[1:]
        sys.exit(_complain(UserError(f"{' '.join(given)}: Hydra cannot compose this ({explained(error)})")))
    except KeyboardInterrupt as error:
        console.print(describe_interrupt(error))
        exit_process(status_of(error))


@stoppable()
def run_plain(command: Callable[[list[str]], object]) -> None:
    """Call `command` on the arguments of a command line that is not Hydra's; errors and Ctrl-C end it as in `run`."""
    _print_anything()
    _show_warnings()
    try:
        command(sys.argv[1:])
    except (UserError, OSError) as error:
        sys.exit(_complain(error))
    except KeyboardInterrupt as error:
        console.print(describe_interrupt(error))
        sys.exit(status_of(error))


def say(line: object) -> None:
    """Print a line as it is: what looks like markup in a name is none."""
    console.print(str(line), soft_wrap=True, highlight=False, markup=False)


def start_run(config: DictConfig) -> tuple[DictConfig, Path, list[str]]:
    """The config, the run's folder and today's overrides; a resumed run has the settings that it saved, under these.

    The run may be another person's: what its settings may not decide is refused, see `duo_id.common.foreign`.

    Raises:
        UserError: the earlier run's settings cannot be read, or may not be followed.
    """
    for library in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(library).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module="lightning")
    _print_anything()  # a job of a sweep may have a process of its own
    _show_warnings()
    given: list[str] = OmegaConf.to_container(HydraConfig.get().overrides.task)  # type: ignore[assignment]
    if config.get("resume"):
        config = OmegaConf.create(literal(resumed(config, given)))
    return config, Path(HydraConfig.get().runtime.output_dir), given


def to_resume(command: str, folder: Path) -> str:
    """The command line that goes on with a run."""
    return f"python -m duo_id.{command} {as_typed(f'resume={folder}')}"


def versions() -> dict[str, str]:
    """Versions of what a result depends on, and the commit of the source tree where it is one."""
    found = {"duo_id": __version__} | {package: version(package) for package in ("torch", "transformers", "lightning")}
    source = Path(__file__).parents[3]
    if (source / ".git").exists():
        git = subprocess.run(["git", "-C", source, "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
        if git.returncode == 0:
            found["commit"] = git.stdout.strip()
    return found


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
                _folder.enter_context(held(folder, f"wait until it ends, or give another {override}"))
        except (UserError, OmegaConfBaseException, OSError) as error:  # Hydra would make a warning of it
            _name(error, OmegaConf.select(config, override, throw_on_resolution_failure=False))
            sys.exit(_complain(error))


@contextmanager
def _holding_job(config: DictConfig) -> Iterator[None]:
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
        raise UserError(f"resume={resume}: there is no {progress} to go on from; leave out resume to start anew")
    return resume


def _print_anything() -> None:
    """Let a letter that the terminal's encoding has not, ASCII's for one, be shown by its code instead of an error."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _show_warnings() -> None:
    """Show each warning as one line, and once, from wherever in the run it comes."""
    shown = set()

    def show(message: Warning | str, *_: Any, **__: Any) -> None:
        if str(message) not in shown:
            shown.add(str(message))
            console.print("[yellow]warning:[/]", escape(str(message)), highlight=False, soft_wrap=True)

    warnings.showwarning = show


def _name(error: BaseException, folder: str | None) -> None:
    """Let an error say where it happened: a full disk names no file."""
    if isinstance(error, OSError) and error.errno is not None and error.filename is None:
        error.filename = folder


def _complain(error: BaseException) -> int:
    """Show an error as one line, without a traceback, and return the exit status."""
    label = "error of another process:" if console.quiet else "error:"
    console.quiet = False
    console.print(f"[bold red]{label}[/]", escape(printable(explained(error))), highlight=False, soft_wrap=True)
    return 2


def _note_failure(error: Exception, expected: bool, ours: bool) -> int:
    """Leave a failed job's error in its folder, if that is `ours`, and return the sweep's exit status.

    The unexpected is shown in full.
    """
    if not expected:
        console.print_exception()
    if ours:
        write_text(Path(HydraConfig.get().runtime.output_dir) / ERROR, explained(error))
    return _complain(error)


def is_distributed() -> bool:
    """Whether this process is connected to others of its run; only one that has imported torch can be."""
    distributed = sys.modules.get("torch.distributed")
    return distributed is not None and distributed.is_available() and distributed.is_initialized()


def exit_process(status: int) -> NoReturn:
    """End this process with an exit status; at once where it is one of several.

    Of several the others may wait for this one in a collective, and what NCCL does at exit would wait for them. So
    it ends without, and whoever started the processes ends the others.
    """
    if is_distributed():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)
