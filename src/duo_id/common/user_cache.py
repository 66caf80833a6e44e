"""Folders in the user's cache: made once, whoever asks, and checked before they are used."""

import os
from collections.abc import Callable
from functools import cache
from pathlib import Path

from filelock import FileLock
from platformdirs import user_cache_path

from duo_id.common.errors import UserError
from duo_id.common.integrity import check_sums

CACHE_ADVICE = "set XDG_CACHE_HOME to a folder of your own"


def cached_folder(name: str, write: Callable[[Path], None]) -> Path:
    """A folder in the user's cache, created on first use.

    A lock makes a second process wait for the first. An existing folder is checked once per process.

    Args:
        name: of the folder.
        write: creates the folder at a path, whole or not at all, see `duo_id.common.files.whole_folder`.

    Raises:
        UserError: a file there is damaged or belongs to another user, or the cache cannot be written.
    """
    folder = user_cache_path("duo_id") / name
    if not folder.is_dir():
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(folder.with_name(f".{name}.lock")):
                if not folder.is_dir():
                    write(folder)
        except PermissionError as error:
            raise UserError(f"{folder} cannot be written ({error.strerror}): {CACHE_ADVICE}") from error
    _check(folder)
    return folder


@cache
def _check(folder: Path) -> None:
    """Raise a `UserError` unless a folder's checksums match and this user, root or its parent's owner owns it."""
    trusted = {0, os.geteuid(), folder.parent.stat().st_uid}
    for path in (folder, *folder.rglob("*")):
        owner = path.lstat().st_uid  # of a link itself, because its owner chooses the target
        if owner not in trusted:
            raise UserError(f"{path} belongs to another user (uid {owner}): remove it, or {CACHE_ADVICE}")
    check_sums(folder, f"remove {folder}, which is then created again")
