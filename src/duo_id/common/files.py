"""Atomic writes: a file or folder appears under its name complete, or not at all."""

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

SPECIAL_FILES = {
    stat.S_IFIFO: "a pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}
RANDOM_LENGTH = 8  # random characters in tempfile's names


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path next to `path` to write to; it replaces `path` if the block ends without an error.

    The file is synced to disk before it is renamed. After an error (a full disk, Ctrl-C) the unfinished file is removed
    and an existing `path` stays as it was. If `path` is a symbolic link, its target is replaced and the link stays.
    Temporary files that killed processes left next to `path` are removed.

    Raises:
        UserError: `path` is a pipe, a device or a socket, which a rename would replace.
    """
    path = _link_target(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(path)
    temporary, handle = _create_locked(
        lambda: tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=path.suffix)
    )
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o666 & ~_umask())
        os.replace(temporary, _link_target(path))
    except OSError as error:
        if error.filename is None:  # as on a full disk
            error.filename = str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)
        os.close(handle)


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Yield a new folder, which becomes `path` if the block ends without an error and is removed otherwise.

    The checksums of its files are added, see `duo_id.common.integrity.check_sums`.

    Raises:
        UserError: another process has created `path` in the meantime.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(path)
    temporary, handle = _create_locked(lambda: _with_handle(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.")))
    try:
        folder = temporary / path.name  # with the usual permissions, unlike mkdtemp's
        folder.mkdir()
        yield folder
        write_sums(folder)
        for file in folder.rglob("*"):
            if file.is_file():
                with open(file, "rb+") as opened:
                    os.fsync(opened.fileno())
        os.rename(folder, path)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST) and str(error.filename2) == str(path):
            raise UserError(f"{path} was created by another process: give another path, or remove it") from None
        if not os.path.dirname(str(error.filename or "")):  # none on a full disk, only the last part in some libraries
            error.filename = str(path)
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        os.close(handle)


def write_text(path: str | Path, text: str) -> None:
    """Write `text` (UTF-8) to `path`, whole or not at all."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _create_locked(make: Callable[[], tuple[int, str]]) -> tuple[Path, int]:
    """A new file or folder and its handle, locked so that no other process's `_remove_leftovers` removes it."""
    while True:
        handle, name = make()
        with suppress(OSError):  # no locks on this file system, so nothing is removed there either
            fcntl.flock(handle, fcntl.LOCK_EX)
        if os.path.lexists(name):
            return Path(name), handle
        os.close(handle)  # another process removed it before it was locked


def _with_handle(folder: str) -> tuple[int, str]:
    return os.open(folder, os.O_RDONLY), folder


def _remove_leftovers(path: Path) -> None:
    """Remove temporary files and folders of `path` left by killed processes; those in use are locked, and stay."""
    prefix = f".{path.name}."
    for leftover in path.parent.glob(f"{escape(prefix)}????????*"):
        random_part = leftover.name.removeprefix(prefix).removesuffix(path.suffix)
        if len(random_part) != RANDOM_LENGTH or leftover.is_symlink() or not (leftover.is_file() or leftover.is_dir()):
            continue
        with suppress(OSError):  # it is in use, already removed, or not ours to remove
            handle = os.open(leftover, os.O_RDONLY | os.O_NOFOLLOW)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
            finally:
                os.close(handle)


def _link_target(path: str | Path) -> Path:
    """The file that a path leads to through symbolic links."""
    try:
        target = Path(path).resolve() if Path(path).is_symlink() else Path(path)
        kind = stat.S_IFMT(target.stat().st_mode)
    except (FileNotFoundError, NotADirectoryError):  # reported when the folder is created
        return target
    except RuntimeError as error:  # a cycle of links, before Python 3.13
        raise UserError(f"{path} is a symbolic link that leads nowhere: remove it or give another path") from error
    if kind in SPECIAL_FILES:
        raise UserError(f"{path} is {SPECIAL_FILES[kind]}, which writing would replace: give another path")
    return target


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
