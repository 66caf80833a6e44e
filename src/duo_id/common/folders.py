"""Run folders: a new one for each run, and one process at a time in each."""

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

LOCK = ".lock"  # in a folder: held by the process that works there, and says which it is
THEIRS = {
    "debug-core.log"
}  # links out of a folder that a logger leaves, wandb's to its own log, and nothing opens again
NO_LOCK = "tells who works in this folder, and is no plain file: remove it"


class _Holder(Data):
    """What `LOCK` says; anybody may have written it."""

    pid: Natural | None = None
    host: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.:-]*$", max_length=255)] | None = None
    sweep: Line | None = None
    job: Natural | None = None


def fresh(folder: str | Path) -> Path:
    """Make a folder that was not there: `folder`, or where that is taken, by a run of the same second, `folder`-2."""
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    for number in count(1):
        made = folder if number == 1 else folder.with_name(f"{folder.name}-{number}")
        with suppress(FileExistsError):
            made.mkdir()
            return made
    raise AssertionError


def folder_of(override: str, value: Any) -> Path:
    """The folder that a setting names, made if it is not there.

    Raises:
        UserError: it names none, or none can be made there.
    """
    if not isinstance(value, str | Path) or not str(value).strip():
        raise UserError(f"{override}={'' if value is None else value}: give a folder")
    try:
        Path(value).mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise UserError(f"{override}={value} is, or lies in, a file: give a folder") from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise UserError(f"{override}={value} cannot be made ({reason}): give another folder") from error
    return Path(value)


def first_process() -> bool:
    """Whether this process is the first of its run, or the only one, as those who start several tell each."""
    ranks = ["RANK"] if "RANK" in os.environ else ["NODE_RANK", "LOCAL_RANK", "SLURM_PROCID"]
    return all(os.environ.get(rank, "0") == "0" for rank in ranks)


def check_links(folder: Path, below: bool = True) -> None:
    """Refuse symbolic links out of a folder that is about to be written to: whoever made it chose where they lead.

    The folder itself may be a link.

    Args:
        folder: that was there before.
        below: look into its folders too.

    Raises:
        UserError: there is one.
    """
    for parent, folders, files in os.walk(folder):
        for name in (*folders, *files):
            if name not in THEIRS:
                check_link(Path(parent, name), folder)
        if not below:
            return


def check_link(path: Path, folder: Path) -> None:
    """Raise a `UserError` if a path is a symbolic link out of the folder that it lies in."""
    if path.is_symlink() and not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder)):
        raise UserError(f"{path} is a symbolic link out of {folder}: remove it, or put there what it leads to")


@contextmanager
def held(folder: Path, advice: str, keep: bool = True, **notes: Any) -> Iterator[dict[str, Any]]:
    """Hold a folder for the block, made if it is not there.

    The lock is the process's: it ends with it, however that ends, and is no child's.

    Args:
        folder: to work in.
        advice: what another process can do instead.
        keep: leave the file that tells who was here; otherwise a folder that stays empty goes too, and nothing is
            written to folders in it.
        notes: told to whoever comes next.

    Yields:
        who was here before: `pid`, `host` and notes; empty if nobody was.

    Raises:
        UserError: another process works there, or what is written there would go elsewhere, see `check_links`.
    """
    made = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    check_links(folder, below=keep)
    handle = _locked(folder / LOCK, advice)
    try:
        before = _told(handle)
        os.ftruncate(handle, 0)
        os.pwrite(handle, json.dumps({"pid": os.getpid(), "host": socket.gethostname()} | notes).encode(), 0)
        yield before
    finally:
        if not keep:
            (folder / LOCK).unlink(missing_ok=True)
            if made:
                with suppress(OSError):  # it holds what was written
                    folder.rmdir()
        os.close(handle)


def _locked(path: Path, advice: str) -> int:
    while True:
        try:
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
        except OSError as error:
            if error.errno not in (errno.ELOOP, errno.EISDIR, errno.ENXIO):  # a link, a folder, a socket
                raise
            raise UserError(f"{path} {NO_LOCK}") from None
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            os.close(handle)
            raise UserError(f"{path} {NO_LOCK}")
        try:
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            told = _told(handle)
            if error.errno in (errno.EACCES, errno.EAGAIN):
                os.close(handle)
                who = f"process {told['pid']} on {told['host']}" if {"pid", "host"} <= told.keys() else "a process"
                raise UserError(f"{path.parent}: {who} works in this folder: {advice}") from None
            return handle  # a file system without locks
        if path.exists() and os.path.samestat(os.fstat(handle), path.stat()):
            return handle
        os.close(handle)  # whoever held it has removed it meanwhile


def _told(handle: int) -> dict[str, Any]:
    try:
        told = parse_json(os.pread(handle, 4096, 0).decode(errors="replace"), LOCK)
        checked(_Holder, told, LOCK)
    except UserError:
        return {}
    return dict(told)
