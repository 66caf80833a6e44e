"""The files between duo_id and its peers: samples are read, answers written line by line."""

import fcntl
import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from duo_id.common.errors import UserError
from duo_id.common.integrity import sealed, unsealed

SAMPLES = "samples.jsonl"  # written by duo_id: a header line, then one item per line
SAMPLES_SCHEMA, ANSWERS_SCHEMA, VERSION = "duo_id/samples", "duo_id/answers", 1

Json = dict[str, Any]


def load_samples(
    folder: Path, tasks: Sequence[str] | None = None, samples: int | None = None
) -> tuple[Json, list[Json], str]:
    """The header, the selected items, and the hash of the samples file.

    Args:
        folder: a run folder.
        tasks: only these; None: all.
        samples: only samples with a lower index; None: all.

    Raises:
        UserError: the file is missing, has another version, or holds no selected items.
    """
    path = folder / SAMPLES
    if not path.is_file():
        raise UserError(f"{path} does not exist: python -m duo_id.evaluate peers=true writes it")
    contents = path.read_bytes()
    try:
        header, *items = _parse_lines(contents)
        schema, number = header.get("schema"), header.get("version")
    except (ValueError, AttributeError) as error:
        raise UserError(f"{path} cannot be read ({error})") from None
    if (schema, number) != (SAMPLES_SCHEMA, VERSION):
        raise UserError(f"{path} is {schema} version {number}; expected {SAMPLES_SCHEMA} version {VERSION}")
    task_names = sorted({item["task"] for item in items})
    for name in tasks or []:
        if name not in task_names:
            raise UserError(f"tasks={name} is not among those of the samples: {', '.join(task_names)}")
    selected = [
        item
        for item in items
        if (samples is None or item["index"] < samples) and (tasks is None or item["task"] in tasks)
    ]
    if not selected:
        raise UserError(f"{path} holds no selected samples: raise samples={samples}")
    return header, selected, hashlib.sha256(contents).hexdigest()


class Answers:
    """The answers file of one press, which grows line by line.

    Args:
        path: of the file; lines of an earlier run are kept, except for a truncated last one.
        header: what all its lines depend on.

    Raises:
        UserError: the file has another header, or another process is writing to it.
    """

    def __init__(self, path: Path, header: Json) -> None:
        self.path = path
        self._done: dict[tuple[Any, ...], Json] = {}
        self._file = open(path, "ab")  # noqa: SIM115 locked until the process exits
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another process is writing to {path}: wait until it exits") from None
        except OSError:  # the file system has no locks
            pass
        contents = path.read_bytes()
        if b"\n" not in contents:
            os.truncate(path, 0)
            self._write(header)
            return
        complete = contents[: contents.rfind(b"\n") + 1]
        if len(complete) < len(contents):
            os.truncate(path, len(complete))
        try:
            saved_header, *lines = _parse_lines(complete)
        except ValueError as error:
            raise UserError(f"{path} cannot be read ({error}): delete it to start anew") from None
        for key in header:
            if saved_header.get(key) != header[key]:
                raise UserError(f"{path} was written with another {key}: delete it to start anew")
        for line in lines:
            self._done[_key(line, line)] = line

    def has(self, item: Json, asked: Json, generates: bool) -> bool:
        """Whether an item is answered as asked, a sparsity or a share of the cache, and generated if wanted."""
        line = self._done.get(_key(item, asked))
        if line is None or "error" in line:
            return False
        if not (generates and item["max_new_tokens"] > 0):
            return True
        pairs = zip(line["questions"], item["questions"], strict=True)
        return all(question["place"] is not None or answer["generated"] for answer, question in pairs)

    def add(self, line: Json) -> None:
        """Add the answers to one item, and write them to disk before returning."""
        self._write(line)
        self._done[_key(line, line)] = line

    def _write(self, line: Json) -> None:
        try:
            self._file.write(json.dumps(sealed(line)).encode() + b"\n")
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            error.filename = str(self.path)  # the error of a full disk names no file
            raise


def _parse_lines(contents: bytes) -> list[Any]:
    """The contents of JSON lines, without their checksums.

    Raises:
        ValueError: a line is not JSON, or fails its checksum.
    """
    lines = enumerate(contents.splitlines(), start=1)
    return [unsealed(json.loads(line), f"line {number}") for number, line in lines]


def _key(item: Json, asked: Json) -> tuple[Any, ...]:
    return item["task"], item["length"], item["index"], asked["sparsity"], asked.get("cache")
