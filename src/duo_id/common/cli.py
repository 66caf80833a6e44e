"""Shared by all commands: compose the config with Hydra, and report a user's mistake in one line."""

import logging
import math
import os
import subprocess
import sys
import traceback
import warnings
from collections.abc import Callable
from importlib.metadata import version
from io import TextIOWrapper
from pathlib import Path
from typing import Any, NoReturn

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import configure_log
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.markup import escape

from duo_id.common.command_help import command_help
from duo_id.common.config import conf_dir
from duo_id.common.console import console, print_error, say, set_missing_filename
from duo_id.common.errors import UserError, naming_extras
from duo_id.common.files import write_text
from duo_id.common.mistakes import (
    check_options,
    describe_error,
    escape_interpolations,
    has_invalid_choice,
    shell_quoted,
)
from duo_id.common.resuming import allow_unknown_keys, resumed_settings
from duo_id.common.run_folders import ERROR, command_folders, locked_job_folder
from duo_id.common.stopping import describe_interrupt, status_of, stoppable
from duo_id.common.tables import WIDE
from duo_id.common.version import __version__

HELP = {"-h", "--help"}


@stoppable()
def run(name: str, command: Callable[[DictConfig], object]) -> None:
    """Compose conf/`name`.yaml with the command line's overrides and call `command` on it.

    A user's mistake ends the process with one line and status 2, Ctrl-C with status 130, and another terminating signal
    with 128 plus its number.
    """
    _escape_unencodable()
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra lets exceptions through, to be reported here
    sys.argv[1:] = allow_unknown_keys(sys.argv[1:])
    config_composed, status = False, 0
    feature = f"duo-id {'data' if name == 'data_gen' else name}"

    def task(config: DictConfig) -> object:
        nonlocal config_composed, status
        config_composed, folder_locked = True, False
        try:
            with locked_job_folder(config), naming_extras(feature):
                folder_locked = True
                return command(config)
        except Exception as error:
            expected = isinstance(error, UserError | HydraException | OmegaConfBaseException | OSError)
            set_missing_filename(error, HydraConfig.get().runtime.output_dir)
            if HydraConfig.get().mode != RunMode.MULTIRUN:
                if expected:
                    exit_process(print_error(error))  # Hydra would add lines of its own
                if is_distributed():
                    traceback.print_exc()
                    exit_process(1)
                raise
            status = _record_failure(error, expected, folder_locked)  # the sweep continues with its other jobs
            return math.nan

    try:
        check_options(sys.argv[1:])
        if HELP.intersection(sys.argv[1:]):
            overrides = [argument for argument in sys.argv[1:] if not argument.startswith("-")]
            say(command_help(name, overrides, console.width if console.is_terminal else WIDE))
            sys.exit(0)
        with command_folders(), naming_extras(feature):
            hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name=name)(task)()
        sys.exit(status)
    except (UserError, HydraException, OmegaConfBaseException, OSError) as error:
        sys.exit(print_error(error))
    except (ValueError, TypeError, AttributeError) as error:  # Hydra's own, as on trainer=null or model=[[a]]
        if config_composed:
            raise
        groups = [text for text in sys.argv[1:] if (conf_dir() / text.strip("+~").partition("=")[0]).is_dir()]
        suspects = [text for text in groups if has_invalid_choice(text)] or sys.argv[1:]
        sys.exit(print_error(UserError(f"{' '.join(suspects)}: Hydra cannot compose this ({describe_error(error)})")))
    except KeyboardInterrupt as error:
        say(describe_interrupt(error))
        exit_process(status_of(error))


@stoppable()
def run_plain(command: Callable[[list[str]], object]) -> None:
    """Call `command`, which does not use Hydra, on the arguments; errors and Ctrl-C are handled as in `run`."""
    _escape_unencodable()
    _show_warnings()
    try:
        command(sys.argv[1:])
    except (UserError, OSError) as error:
        sys.exit(print_error(error))
    except KeyboardInterrupt as error:
        say(describe_interrupt(error))
        sys.exit(status_of(error))


def start_run(config: DictConfig) -> tuple[DictConfig, Path, list[str]]:
    """The config, the run's folder and the command line's overrides; a resumed run starts from its saved settings.

    The run may be another person's, so settings that could run code or reach other files are refused, see
    `duo_id.common.foreign`.

    Raises:
        UserError: the earlier run's settings cannot be read, or are not trusted.
    """
    _escape_unencodable()  # again, since a sweep's job may run in its own process
    _show_warnings()
    overrides: list[str] = OmegaConf.to_container(HydraConfig.get().overrides.task)  # type: ignore[assignment]
    if config.get("resume"):
        config = OmegaConf.create(escape_interpolations(resumed_settings(config, overrides)))
    return config, Path(HydraConfig.get().runtime.output_dir), overrides


def quiet_libraries() -> None:
    """Treat the loggers of libraries as Hydra's logging configuration does; those imported after it escape it."""
    if HydraConfig.initialized():
        configure_log(HydraConfig.get().job_logging, HydraConfig.get().verbose)  # type: ignore[arg-type]
    for library in ("lightning.pytorch", "lightning.fabric"):  # which set these levels when they are imported
        logging.getLogger(library).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module="lightning")


def resume_command(command: str, folder: Path) -> str:
    """The command line that resumes a run."""
    return f"python -m duo_id.{command} {shell_quoted(f'resume={folder}')}"


def versions() -> dict[str, str]:
    """Versions of the packages that results depend on, and the commit if this is a git checkout."""
    packages = ("torch", "transformers", "lightning")
    provenance = {"duo_id": __version__} | {package: version(package) for package in packages}
    source = Path(__file__).parents[3]
    if (source / ".git").exists():
        git = subprocess.run(["git", "-C", source, "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
        if git.returncode == 0:
            provenance["commit"] = git.stdout.strip()
    return provenance


def _escape_unencodable() -> None:
    """Print characters that the terminal's encoding lacks as escape sequences instead of raising an error."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _show_warnings() -> None:
    """Show each warning once, as one line, whichever part of the run raises it."""
    for library in ("torchao", "torch.utils._pytree"):  # as transformers imports them: of kernels that are not used
        logging.getLogger(library).setLevel(logging.ERROR)
    printed = set()

    def show(message: Warning | str, *_: Any, **__: Any) -> None:
        if str(message) not in printed:
            printed.add(str(message))
            console.print("[yellow]warning:[/]", escape(str(message)), highlight=False, soft_wrap=True)

    warnings.showwarning = show


def _record_failure(error: Exception, expected: bool, folder_locked: bool) -> int:
    """Print a failed job's error and return the sweep's exit status; unexpected errors are printed with a traceback.

    The error is also written to the job's folder if this process has locked it.
    """
    if not expected:
        console.print_exception()
    if folder_locked:
        write_text(Path(HydraConfig.get().runtime.output_dir) / ERROR, describe_error(error))
    return print_error(error)


def is_distributed() -> bool:
    """Whether this process is in a process group with others of its run, which takes an import of torch."""
    distributed = sys.modules.get("torch.distributed")
    return distributed is not None and distributed.is_available() and distributed.is_initialized()


def exit_process(status: int) -> NoReturn:
    """End this process with an exit status, without cleaning up if it is one of several.

    The others may be waiting for this one in a collective, and NCCL's cleanup at exit would wait for them. Whoever
    started the processes then ends the others.
    """
    if is_distributed():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)
