"""Run folders: a new one for each run, and one process at a time in each."""

import errno
import fcntl
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from duo_id.common.documents import Count, Data, Line, checked, parse_json
from duo_id.common.errors import UserError

LOCK = ".lock"  # in a folder: held by the process that works there, and says which it is


class _Holder(Data):
    """What `LOCK` says; anybody may have written it."""

    pid: Count | None = None
    host: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.:-]*$", max_length=255)] | None = None
    sweep: Line | None = None
    job: Count | None = None


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


def first_process() -> bool:
    """Whether this process is the first of its run, or the only one, as those who start several tell each."""
    ranks = ["RANK"] if "RANK" in os.environ else ["NODE_RANK", "LOCAL_RANK", "SLURM_PROCID"]
    return all(os.environ.get(rank, "0") == "0" for rank in ranks)


@contextmanager
def held(folder: Path, advice: str, keep: bool = True, **notes: Any) -> Iterator[dict[str, Any]]:
    """Hold a folder for the block, made if it is not there.

    The lock is the process's: it ends with it, however that ends, and is no child's.

    Args:
        folder: to work in.
        advice: what another process can do instead.
        keep: leave the file that tells who was here; otherwise a folder that stays empty goes too.
        notes: told to whoever comes next.

    Yields:
        who was here before: `pid`, `host` and notes; empty if nobody was.

    Raises:
        UserError: another process works there.
    """
    made = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
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
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
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
