"""Checksums in the files that duo_id writes, checked whenever they are read again.

Each is a SHA-256, stored so that data and checksum are replaced, copied and renamed together: in a key or a column
`sha256`, in the comment at the end of a zip archive, or in the `SHA256SUMS` of a folder that is written as a whole.
Files without one, from earlier versions or other tools, are accepted as they are.
"""

import hashlib
import json
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from duo_id.common.errors import UserError

SEAL = "sha256"
SUMS = "SHA256SUMS"  # of a folder, in the format of `sha256sum -c`
DIFFERS = "is not what was written: its sha256 differs"
RESTORE_ADVICE = f"restore it or write it again, or delete its {SEAL} if you changed it yourself"
DIGEST_PREFIX = "sha256:"  # of a checksum within a file
COMMENT_LENGTH = len(DIGEST_PREFIX) + 64


def sealed(contents: Mapping[str, Any]) -> dict[str, Any]:
    """A JSON object with the checksum of its contents, which does not depend on its formatting."""
    plain = json.loads(json.dumps(contents))
    plain.pop(SEAL, None)  # an earlier checksum
    return plain | {SEAL: _digest(plain)}


def unsealed(contents: Any, where: object = "it", advice: str = "") -> Any:
    """The contents of a JSON file or line without their checksum.

    Args:
        contents: parsed JSON; only objects have a checksum.
        where: the file, and line, for the message.
        advice: what to do if the checksum differs.

    Raises:
        UserError: the checksum differs.
    """
    if not isinstance(contents, dict) or not any(map(_is_seal, contents, contents.values())):
        return contents
    plain = {key: value for key, value in contents.items() if key != SEAL}
    _check(contents.get(SEAL) == _digest(plain), where, advice)
    return plain


def sealed_csv(text: str) -> str:
    """A CSV table with a last column `sha256`, which holds the checksum of the other columns in its first row."""
    head, first, *rows = text.splitlines()
    lines = [f"{head},{SEAL}", f"{first},{DIGEST_PREFIX}{digest_of(text)}", *(f"{row}," for row in rows)]
    return "".join(f"{line}\n" for line in lines)


def unsealed_csv(text: str, where: object, advice: str) -> str:
    """A CSV table without its checksum.

    Raises:
        UserError: the checksum differs.
    """
    if SEAL not in text:
        return text
    cells = [line.rpartition(",") for line in text.splitlines()]
    plain = "".join(f"{cell[0]}\n" for cell in cells)
    _check(
        [cell[2] for cell in cells[1:]] == [DIGEST_PREFIX + digest_of(plain), *[""] * (len(cells) - 2)], where, advice
    )
    return plain


def digest_of(text: str) -> str:
    """The SHA-256 of a text's UTF-8 bytes, as 64 hexadecimal digits."""
    return hashlib.sha256(text.encode()).hexdigest()


def seal_zip(path: Path) -> None:
    """Store the checksum of a zip archive without a comment, such as torch.save writes, in its comment."""
    with open(path, "rb+") as file:
        file.seek(-2, os.SEEK_END)
        assert file.read() == bytes(2), "the archive has a comment"
        file.seek(-2, os.SEEK_END)
        file.write(struct.pack("<H", COMMENT_LENGTH))
        file.seek(0)
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        file.seek(0, os.SEEK_END)
        file.write((DIGEST_PREFIX + digest).encode())


def check_zip(path: str | Path) -> None:
    """Raise a `UserError` if a zip archive differs from the checksum in its comment."""
    contents = Path(path).read_bytes()
    body, comment = contents[:-COMMENT_LENGTH], contents[-COMMENT_LENGTH:]
    expected = (DIGEST_PREFIX + hashlib.sha256(body).hexdigest()).encode()
    _check(not comment.startswith(DIGEST_PREFIX.encode()) or comment == expected, "it", "")


def write_sums(folder: Path) -> None:
    """Write the checksums of all files in a folder to its `SHA256SUMS`, if there are any files."""
    if lines := [f"{_file_digest(path)}  {name}\n" for name, path in sorted(_files(folder).items())]:
        (folder / SUMS).write_text("".join(lines), encoding="utf-8")


def check_sums(folder: Path, advice: str, parts: tuple[str, ...] = ()) -> None:
    """Raise a `UserError` if files in a folder differ from its checksums or are missing; others are ignored.

    Args:
        folder: with or without a `SHA256SUMS`.
        advice: what to do about a file that differs or is missing.
        parts: files and folders in it to check; empty: all.
    """
    if not (folder / SUMS).is_file():
        return
    files = _files(folder)  # paths in the sums are only looked up here, as they may come from others
    for number, line in enumerate((folder / SUMS).read_text(encoding="utf-8", errors="replace").splitlines(), start=1):
        digest, space, name = line.partition("  ")
        if len(digest) != 64 or not space:
            raise UserError(f"{folder / SUMS}, line {number} is no checksum followed by a file; {advice}")
        if parts and name.partition("/")[0] not in parts:
            continue
        if name not in files:
            raise UserError(f"{folder / SUMS} lists {name!r:.200}, which is missing; {advice}")
        _check(_file_digest(files[name]) == digest, files[name], advice)


def _is_seal(key: str, value: Any) -> bool:
    """Whether this is a checksum, even if its key or the prefix of its value is damaged."""
    return key == SEAL or (isinstance(value, str) and value.startswith(DIGEST_PREFIX))


def _digest(plain: Any) -> str:
    return DIGEST_PREFIX + digest_of(json.dumps(plain, sort_keys=True))


def _file_digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _files(folder: Path) -> dict[str, Path]:
    """The files in a folder except `SHA256SUMS`, by their relative paths."""
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    return {name: path for name, path in files.items() if name != SUMS}


def _check(matches: bool, where: object, advice: str) -> None:
    if not matches:
        raise UserError(f"{where} {DIFFERS}; {advice}".removesuffix("; "))
