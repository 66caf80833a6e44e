"""What the commands share: compose the config with Hydra, and show a user's mistake as one line."""

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
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.markup import escape

from duo_id.common.config import conf_dir
from duo_id.common.console import complain, console, name_folder, say
from duo_id.common.errors import UserError, naming_extras
from duo_id.common.files import write_text
from duo_id.common.mistakes import as_typed, explained, literal, no_choice
from duo_id.common.resuming import open_to_any, resumed
from duo_id.common.run_folders import ERROR, begin, holding_job
from duo_id.common.stopping import describe_interrupt, status_of, stoppable
from duo_id.common.version import __version__


@stoppable()
def run(name: str, command: Callable[[DictConfig], object]) -> None:
    """Compose conf/`name`.yaml with the command line's overrides and call `command` on it.

    A mistake of the user ends the process with one line and status 2, Ctrl-C with status 130, and another signal that
    asks for the end with 128 and its number.
    """
    _print_anything()
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra hands exceptions on, to be shown here
    sys.argv[1:] = open_to_any(sys.argv[1:])
    composed, status = False, 0

    def task(config: DictConfig) -> object:
        nonlocal composed, status
        composed, ours = True, False
        try:
            with holding_job(config), naming_extras(name):
                ours = True
                return command(config)
        except Exception as error:
            expected = isinstance(error, UserError | HydraException | OmegaConfBaseException | OSError)
            name_folder(error, HydraConfig.get().runtime.output_dir)
            if HydraConfig.get().mode != RunMode.MULTIRUN:
                if expected:
                    exit_process(complain(error))  # Hydra would print more
                if is_distributed():
                    traceback.print_exc()
                    exit_process(1)
                raise
            status = _note_failure(error, expected, ours)  # the other jobs of a sweep go on
            return math.nan

    try:
        with begin(), naming_extras(name):
            hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name=name)(task)()
        sys.exit(status)
    except (UserError, HydraException, OmegaConfBaseException, OSError) as error:
        sys.exit(complain(error))
    except (ValueError, TypeError, AttributeError) as error:  # Hydra's own, as on trainer=null or model=[[a]]
        if composed:
            raise
        groups = [text for text in sys.argv[1:] if (conf_dir() / text.strip("+~").partition("=")[0]).is_dir()]
        given = [text for text in groups if no_choice(text)] or sys.argv[1:]
        sys.exit(complain(UserError(f"{' '.join(given)}: Hydra cannot compose this ({explained(error)})")))
    except KeyboardInterrupt as error:
        say(describe_interrupt(error))
        exit_process(status_of(error))


@stoppable()
def run_plain(command: Callable[[list[str]], object]) -> None:
    """Call `command` on the arguments of a command line that is not Hydra's; errors and Ctrl-C end it as in `run`."""
    _print_anything()
    _show_warnings()
    try:
        with naming_extras():
            command(sys.argv[1:])
    except (UserError, OSError) as error:
        sys.exit(complain(error))
    except KeyboardInterrupt as error:
        say(describe_interrupt(error))
        sys.exit(status_of(error))


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


def _note_failure(error: Exception, expected: bool, ours: bool) -> int:
    """Leave a failed job's error in its folder, if that is `ours`, and return the sweep's exit status.

    The unexpected is shown in full.
    """
    if not expected:
        console.print_exception()
    if ours:
        write_text(Path(HydraConfig.get().runtime.output_dir) / ERROR, explained(error))
    return complain(error)


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
