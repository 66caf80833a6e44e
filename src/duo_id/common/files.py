"""Whole files or none: what is written appears under its name complete, or not at all."""

import errno
import fcntl
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from glob import escape
from pathlib import Path

from duo_id.common.errors import UserError
from duo_id.common.integrity import write_sums

KINDS = {
    stat.S_IFIFO: "a pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}
RANDOM = 8  # characters that tempfile puts into a name


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a path beside `path` to write to; it replaces `path` once the block ends without an error.

    The file is synced to disk before it is renamed. After an error (a full disk, Ctrl-C) the unfinished
    file is removed and whatever stood under `path` stays. Of a symbolic link the file that it leads to is
    written, and the link stays. What a killed process left beside `path` is removed.

    Raises:
        UserError: `path` is a pipe, a device or a socket, which a rename would replace.
    """
    path = _through(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(path)
    beside, handle = _reserved(lambda: tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=path.suffix))
    try:
        yield beside
        with open(beside, "rb+") as file:
            os.fsync(file.fileno())
        beside.chmod(0o666 & ~_umask())
        os.replace(beside, _through(path))
    except OSError as error:
        if error.filename is None:  # a full disk has none
            error.filename = str(path)
        raise
    finally:
        beside.unlink(missing_ok=True)
        os.close(handle)


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Yield a new folder beside `path`; it becomes `path` once the block ends without an error, else it is removed.

    The checksums of its files are left in it, see `duo_id.common.integrity.check_sums`.

    Raises:
        UserError: another process has made `path` meanwhile.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(path)
    beside, handle = _reserved(lambda: _opened(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.")))
    try:
        work = beside / path.name  # made with the usual permissions, which mkdtemp withholds
        work.mkdir()
        yield work
        write_sums(work)
        for file in work.rglob("*"):
            if file.is_file():
                with open(file, "rb+") as opened:
                    os.fsync(opened.fileno())
        os.rename(work, path)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST) and str(error.filename2) == str(path):
            raise UserError(f"{path} exists by now, another process has made it: give another, or remove it") from None
        if not os.path.dirname(str(error.filename or "")):  # a full disk names none, some libraries the end alone
            error.filename = str(path)
        raise
    finally:
        shutil.rmtree(beside, ignore_errors=True)
        os.close(handle)


def write_text(path: str | Path, text: str) -> None:
    """Write `text` (UTF-8) to `path`, whole or not at all."""
    with atomic_path(path) as beside:
        beside.write_text(text, encoding="utf-8")


def _reserved(make: Callable[[], tuple[int, str]]) -> tuple[Path, int]:
    """A new file or folder with its handle, locked: `_remove_leftovers` of another process lets it stay."""
    while True:
        handle, name = make()
        with suppress(OSError):  # a file system without locks, where nothing is removed either
            fcntl.flock(handle, fcntl.LOCK_EX)
        if os.path.lexists(name):
            return Path(name), handle
        os.close(handle)  # removed before it was locked


def _opened(folder: str) -> tuple[int, str]:
    return os.open(folder, os.O_RDONLY), folder


def _remove_leftovers(path: Path) -> None:
    """Remove what processes that were killed have left beside `path`; what somebody writes is locked, and stays."""
    known = f".{path.name}."
    for beside in path.parent.glob(f"{escape(known)}????????*"):
        end = beside.name.removeprefix(known).removesuffix(path.suffix)
        if len(end) != RANDOM or beside.is_symlink() or not (beside.is_file() or beside.is_dir()):
            continue
        with suppress(OSError):  # somebody writes to it, another has removed it, or it is not ours to remove
            handle = os.open(beside, os.O_RDONLY | os.O_NOFOLLOW)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(beside) if beside.is_dir() else beside.unlink()
            finally:
                os.close(handle)


def _through(path: str | Path) -> Path:
    """The file that a path leads to, through symbolic links."""
    try:
        target = Path(path).resolve() if Path(path).is_symlink() else Path(path)
        kind = stat.S_IFMT(target.stat().st_mode)
    except (FileNotFoundError, NotADirectoryError):  # which is told where the folder is made
        return target
    except RuntimeError as error:  # links in a circle, as Python before 3.13 has it
        raise UserError(f"{path} is a symbolic link that leads nowhere: remove it or give another path") from error
    if kind in KINDS:
        raise UserError(f"{path} is {KINDS[kind]}, which a file would replace: give another path")
    return target


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
