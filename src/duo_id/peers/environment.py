"""The environment of kvpress, which wants an older transformers than duo_id and cannot share an environment with it."""

import subprocess
import venv
from collections.abc import Callable
from pathlib import Path

from duo_id.common.errors import UserError, check, one_line
from duo_id.common.files import write_text
from duo_id.common.folders import lock_folder

REQUIREMENTS = Path(__file__).with_name("requirements.txt")
INSTALLED = "duo_id-peers.txt"  # the requirements of a finished installation, in the environment's folder
CONFLICT = "kvpress 0.5.5 needs transformers<5.3 and duo_id transformers>=5.15, so it has an environment of its own"


def python_of(folder: Path) -> Path:
    """The Python of an environment.

    Raises:
        UserError: the folder holds no environment.
    """
    python = folder / "bin" / "python"
    check(python.is_file(), f"environment={folder} does not exist, install=true creates it: {CONFLICT}")
    return python.absolute()  # unresolved: by its path Python finds the environment


def install(folder: Path, announce: Callable[[str], object]) -> None:
    """Create the environment, or bring it up to date, with the packages of requirements.txt.

    Args:
        folder: of the environment.
        announce: called with a line before the work begins; not called if the environment is up to date.

    Raises:
        UserError: the folder holds something else, or pip cannot install the packages.
    """
    is_free = not folder.exists() or (folder.is_dir() and not any(folder.iterdir()))
    check(
        is_free or (folder / "pyvenv.cfg").is_file(),
        f"environment={folder} exists and is no virtual environment: give another folder",
    )
    wanted, finished = REQUIREMENTS.read_text(), folder / INSTALLED
    if finished.is_file() and finished.read_text() == wanted:
        return
    announce(f"installing kvpress into {folder}: this takes some minutes, once")
    with lock_folder(folder, "wait until it ends, or give another environment", keep=False):
        try:
            venv.create(folder, with_pip=True)
        except subprocess.CalledProcessError as error:  # a Python without ensurepip, as Debian splits it off
            reason = f"this Python cannot install pip ({one_line(error)})"
            raise UserError(f"environment={folder} cannot be created: {reason}") from error
        command = [str(folder / "bin" / "python"), "-m", "pip", "install", "-qq", "-r", str(REQUIREMENTS)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise UserError(f"environment={folder}: pip cannot install kvpress: {_reason(done.stderr)}")
        write_text(finished, wanted)


def _reason(output: str) -> str:
    """The last error of pip's, or its last line."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR")]
    return next(iter([*errors[-1:], *lines[-1:]]), "it says nothing")
