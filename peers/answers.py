"""What goes between duo_id and its peers: samples are read, answers written line by line."""

import fcntl
import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

SAMPLES = "samples.jsonl"  # written by duo_id: a header line, then one item a line
SAMPLES_SCHEMA, ANSWERS_SCHEMA, VERSION = "duo_id/samples", "duo_id/answers", 1

Json = dict[str, Any]


class Mistake(ValueError):
    """Something that the user can mend; the message is one line."""


def load_samples(
    folder: Path, tasks: Sequence[str] | None = None, samples: int | None = None
) -> tuple[Json, list[Json], str]:
    """Header, the items that are wanted, and the hash of the samples' file.

    Args:
        folder: a run folder.
        tasks: only these; None: all.
        samples: only samples with a lower index; None: all.

    Raises:
        Mistake: the file is missing, of another version, or holds nothing that is wanted.
    """
    path = folder / SAMPLES
    if not path.is_file():
        raise Mistake(f"{path} does not exist: python -m duo_id.evaluate peers=true writes it")
    contents = path.read_bytes()
    try:
        header, *items = _parsed(contents)
        schema, number = header.get("schema"), header.get("version")
    except (ValueError, AttributeError) as error:
        raise Mistake(f"{path} cannot be read ({error})") from None
    if (schema, number) != (SAMPLES_SCHEMA, VERSION):
        raise Mistake(f"{path} is {schema} of version {number}, this reads version {VERSION} of {SAMPLES_SCHEMA}")
    known = sorted({item["task"] for item in items})
    for name in tasks or []:
        if name not in known:
            raise Mistake(f"tasks={name} is not among those of the samples: {', '.join(known)}")
    wanted = [
        item
        for item in items
        if (samples is None or item["index"] < samples) and (tasks is None or item["task"] in tasks)
    ]
    if not wanted:
        raise Mistake(f"{path} holds no sample that is wanted: raise samples={samples}")
    return header, wanted, hashlib.sha256(contents).hexdigest()


class Answers:
    """The file of one press's answers, which grows line by line.

    Args:
        path: of the file; what an earlier run wrote is kept, but for a last line that was cut short.
        header: what all its lines depend on.

    Raises:
        Mistake: the file was written under another header, or another process writes to it.
    """

    def __init__(self, path: Path, header: Json) -> None:
        self.path = path
        self._done: dict[tuple[Any, ...], Json] = {}
        self._file = open(path, "ab")  # noqa: SIM115 locked until the process ends
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Mistake(f"another process writes to {path}: wait until it ends") from None
        except OSError:  # a file system without locks
            pass
        contents = path.read_bytes()
        if b"\n" not in contents:
            os.truncate(path, 0)
            self._write(header)
            return
        whole = contents[: contents.rfind(b"\n") + 1]
        if len(whole) < len(contents):
            os.truncate(path, len(whole))
        try:
            found, *lines = _parsed(whole)
        except ValueError as error:
            raise Mistake(f"{path} cannot be read ({error}): delete it to start anew") from None
        for key in header:
            if found.get(key) != header[key]:
                raise Mistake(f"{path} was written under another {key}: delete it to start anew")
        for line in lines:
            self._done[_key(line, line["sparsity"])] = line

    def has(self, item: Json, sparsity: float, generates: bool) -> bool:
        """Whether an item is answered, generated answers among it if wanted."""
        line = self._done.get(_key(item, sparsity))
        if line is None or "error" in line:
            return False
        wanted = generates and item["max_new_tokens"] > 0
        questions = zip(line["questions"], item["questions"], strict=True)
        return all(not wanted or asked["place"] is not None or done["generated"] for done, asked in questions)

    def add(self, line: Json) -> None:
        """Take in the answers to one item and write them to the disk before returning."""
        self._write(line)
        self._done[_key(line, line["sparsity"])] = line

    def _write(self, line: Json) -> None:
        try:
            self._file.write(json.dumps(_sealed(line)).encode() + b"\n")
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            error.filename = str(self.path)  # a full disk names none
            raise


def _sealed(line: Json) -> Json:
    """A line with the checksum of what it holds, as duo_id checks it."""
    plain = json.loads(json.dumps(line))
    return plain | {"sha256": "sha256:" + hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()}


def _parsed(contents: bytes) -> list[Any]:
    """What lines of JSON hold, without their checksums.

    Raises:
        ValueError: a line is not JSON, or not what was written.
    """
    lines = [json.loads(line) for line in contents.splitlines()]
    for number, line in enumerate(lines, start=1):
        digest = line.pop("sha256", None) if isinstance(line, dict) else None
        if digest is not None and digest != _sealed(line)["sha256"]:
            raise ValueError(f"line {number} is not what was written: its sha256 differs")
    return lines


def _key(line: Json, sparsity: float) -> tuple[Any, ...]:
    return line["task"], line["length"], line["index"], sparsity
