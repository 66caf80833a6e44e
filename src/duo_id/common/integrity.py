"""Checksums: what is written here and read again says by itself whether it still is what was written.

Each is a SHA-256, and stands where a file and its checksum are replaced, copied and renamed as one: in a key or a
column `sha256`, in the comment that may end a zip archive, or in the `SHA256SUMS` of a folder that appears as a whole.
What has none, because an earlier version or another tool wrote it, is taken as it is.
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
SUMS = "SHA256SUMS"  # of a folder, as `sha256sum -c` reads it
DIFFERS = "is not what was written: its sha256 differs"
AGAIN = f"restore it or write it again, or delete its {SEAL} if you changed it yourself"
MARK = "sha256:"  # what a checksum within a file begins with
COMMENT = len(MARK) + 64


def sealed(contents: Mapping[str, Any]) -> dict[str, Any]:
    """A JSON object with the checksum of all that it holds, however it is then laid out."""
    plain = json.loads(json.dumps(contents))
    plain.pop(SEAL, None)  # of what it held before
    return plain | {SEAL: _digest(plain)}


def unsealed(contents: Any, where: object = "it", advice: str = "") -> Any:
    """What a JSON file or line holds, without its checksum.

    Args:
        contents: parsed; what is no object has no checksum.
        where: the file, and line, for the message.
        advice: what to do about it.

    Raises:
        UserError: the checksum is another.
    """
    if not isinstance(contents, dict) or not any(map(_is_seal, contents, contents.values())):
        return contents
    plain = {key: value for key, value in contents.items() if key != SEAL}
    _check(contents.get(SEAL) == _digest(plain), where, advice)
    return plain


def sealed_csv(text: str) -> str:
    """A table of comma-separated values with a last column `sha256`: its first row has that of the other columns."""
    head, first, *rows = text.splitlines()
    lines = [f"{head},{SEAL}", f"{first},{MARK}{digest_of(text)}", *(f"{row}," for row in rows)]
    return "".join(f"{line}\n" for line in lines)


def unsealed_csv(text: str, where: object, advice: str) -> str:
    """A table without its checksum.

    Raises:
        UserError: the checksum is another.
    """
    if SEAL not in text:
        return text
    cells = [line.rpartition(",") for line in text.splitlines()]
    plain = "".join(f"{cell[0]}\n" for cell in cells)
    _check([cell[2] for cell in cells[1:]] == [MARK + digest_of(plain), *[""] * (len(cells) - 2)], where, advice)
    return plain


def digest_of(text: str) -> str:
    """The SHA-256 of a text in UTF-8, as 64 hexadecimal digits."""
    return hashlib.sha256(text.encode()).hexdigest()


def seal_zip(path: Path) -> None:
    """Put the checksum of a zip archive without a comment, as torch.save writes it, into its comment."""
    with open(path, "rb+") as file:
        file.seek(-2, os.SEEK_END)
        assert file.read() == bytes(2), "it has a comment"
        file.seek(-2, os.SEEK_END)
        file.write(struct.pack("<H", COMMENT))
        file.seek(0)
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        file.seek(0, os.SEEK_END)
        file.write((MARK + digest).encode())


def check_zip(path: str | Path) -> None:
    """Raise a `UserError` unless an archive is what its comment says, or has none."""
    contents = Path(path).read_bytes()
    body, comment = contents[:-COMMENT], contents[-COMMENT:]
    known = (MARK + hashlib.sha256(body).hexdigest()).encode()
    _check(not comment.startswith(MARK.encode()) or comment == known, "it", "")


def write_sums(folder: Path) -> None:
    """Leave the checksums of all files in a folder there, if it has any."""
    if lines := [f"{_of_file(path)}  {name}\n" for name, path in sorted(_files(folder).items())]:
        (folder / SUMS).write_text("".join(lines), encoding="utf-8")


def check_sums(folder: Path, advice: str, parts: tuple[str, ...] = ()) -> None:
    """Raise a `UserError` unless the files in a folder are what its checksums say; others may lie there too.

    Args:
        folder: with its `SHA256SUMS`, or without.
        advice: what to do about a file that is another or missing.
        parts: files and folders in it that are of interest; none: all.
    """
    if not (folder / SUMS).is_file():
        return
    files = _files(folder)  # no path is taken from the sums, which may come from others
    for number, line in enumerate((folder / SUMS).read_text(encoding="utf-8", errors="replace").splitlines(), start=1):
        digest, space, name = line.partition("  ")
        if len(digest) != 64 or not space:
            raise UserError(f"{folder / SUMS}, line {number}: no checksum and file; {advice}")
        if parts and name.partition("/")[0] not in parts:
            continue
        if name not in files:
            raise UserError(f"{folder / SUMS} tells of {name!r:.200}, which is missing; {advice}")
        _check(_of_file(files[name]) == digest, files[name], advice)


def _is_seal(key: str, value: Any) -> bool:
    """Whether this is a checksum, also where a bit of its key or of its value's beginning is another."""
    return key == SEAL or (isinstance(value, str) and value.startswith(MARK))


def _digest(plain: Any) -> str:
    return MARK + digest_of(json.dumps(plain, sort_keys=True))


def _of_file(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _files(folder: Path) -> dict[str, Path]:
    """The files in a folder, by their names there."""
    found = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    return {name: path for name, path in found.items() if name != SUMS}


def _check(same: bool, where: object, advice: str) -> None:
    if not same:
        raise UserError(f"{where} {DIFFERS}; {advice}".removesuffix("; "))
