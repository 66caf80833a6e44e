"""Output folders: a new one for each run, and one process at a time in each."""

import errno
import fcntl
import json
import os
import socket
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from duo_id.common.documents import Data, Line, Natural, checked, parse_json
from duo_id.common.errors import UserError

LOCK = ".lock"  # in a folder: locked by the process that works there, and names it
LOGGER_LINKS = {"debug-core.log"}  # links out of the folder, by wandb to its own log, that nothing opens again
NOT_A_LOCK = "should be the lock file of this folder, but is no regular file: remove it"


class _LockHolder(Data):
    """The contents of `LOCK`, which anybody may have written."""

    pid: Natural | None = None
    host: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.:-]*$", max_length=255)] | None = None
    sweep: Line | None = None
    job: Natural | None = None


def make_new_folder(folder: str | Path) -> Path:
    """Create and return `folder`, or if it exists, as with runs started in the same second, `folder`-2 and so on."""
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    for number in count(1):
        candidate = folder if number == 1 else folder.with_name(f"{folder.name}-{number}")
        with suppress(FileExistsError):
            candidate.mkdir()
            return candidate
    raise AssertionError


def folder_of(override: str, value: Any) -> Path:
    """The folder that a setting names, created if it does not exist.

    Raises:
        UserError: the setting names no folder, or the folder cannot be created.
    """
    if not isinstance(value, str | Path) or not str(value).strip():
        raise UserError(f"{override}={'' if value is None else value}: give a folder")
    try:
        Path(value).mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise UserError(f"{override}={value} is, or lies in, a file: give a folder") from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise UserError(f"{override}={value} cannot be created ({reason}): give another folder") from error
    return Path(value)


def first_process() -> bool:
    """Whether this process is the first or only one of its run, by the launcher's environment variables."""
    ranks = ["RANK"] if "RANK" in os.environ else ["NODE_RANK", "LOCAL_RANK", "SLURM_PROCID"]
    return all(os.environ.get(rank, "0") == "0" for rank in ranks)


def check_links(folder: Path, below: bool = True) -> None:
    """Refuse symbolic links out of a folder that is about to be written to: whoever created it chose their targets.

    The folder itself may be a link.

    Args:
        folder: an existing folder.
        below: check its subfolders too.

    Raises:
        UserError: there is such a link.
    """
    for parent, folders, files in os.walk(folder):
        for name in (*folders, *files):
            if name not in LOGGER_LINKS:
                check_link(Path(parent, name), folder)
        if not below:
            return


def check_link(path: Path, folder: Path) -> None:
    """Raise a `UserError` if a path is a symbolic link out of the folder that contains it."""
    if path.is_symlink() and not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder)):
        raise UserError(f"{path} is a symbolic link out of {folder}: remove it, or replace it by its target")


@contextmanager
def lock_folder(folder: Path, advice: str, keep: bool = True, **notes: Any) -> Iterator[dict[str, Any]]:
    """Lock a folder for the block, and create it if it does not exist.

    The lock belongs to this process: it ends with the process, however that ends, and children do not inherit it.

    Args:
        folder: to work in.
        advice: what to do if another process works there.
        keep: keep the lock file; otherwise it is removed, as is a folder that was created here and stayed empty, and
            subfolders are not checked because nothing is written to them.
        notes: recorded for the next process that locks the folder.

    Yields:
        the previous holder of the lock: `pid`, `host` and notes; empty if there was none.

    Raises:
        UserError: another process works there, or a link leads out of the folder, see `check_links`.
    """
    created = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    check_links(folder, below=keep)
    handle = _open_lock(folder / LOCK, advice)
    try:
        previous_holder = _read_holder(handle)
        os.ftruncate(handle, 0)
        os.pwrite(handle, json.dumps({"pid": os.getpid(), "host": socket.gethostname()} | notes).encode(), 0)
        yield previous_holder
    finally:
        if not keep:
            (folder / LOCK).unlink(missing_ok=True)
            if created:
                with suppress(OSError):  # it is not empty
                    folder.rmdir()
        os.close(handle)


def _open_lock(path: Path, advice: str) -> int:
    while True:
        try:
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
        except OSError as error:
            if error.errno not in (errno.ELOOP, errno.EISDIR, errno.ENXIO):  # a link, a folder, a socket
                raise
            raise UserError(f"{path} {NOT_A_LOCK}") from None
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            os.close(handle)
            raise UserError(f"{path} {NOT_A_LOCK}")
        try:
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = _read_holder(handle)
            if error.errno in (errno.EACCES, errno.EAGAIN):
                os.close(handle)
                named = {"pid", "host"} <= holder.keys()
                name = f"process {holder['pid']} on {holder['host']}" if named else "a process"
                raise UserError(f"{path.parent}: {name} is working in this folder: {advice}") from None
            return handle  # a file system without locks
        if path.exists() and os.path.samestat(os.fstat(handle), path.stat()):
            return handle
        os.close(handle)  # its previous holder has removed it in the meantime


def _read_holder(handle: int) -> dict[str, Any]:
    try:
        holder = parse_json(os.pread(handle, 4096, 0).decode(errors="replace"), LOCK)
        checked(_LockHolder, holder, LOCK)
    except UserError:
        return {}
    return dict(holder)
