"""Samples for peers that run in an environment of their own, and their answers back: see peers/README.md."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from duo_id.common.documents import (
    FIRST,
    LARGEST_ROWS,
    Data,
    Line,
    Natural,
    Share,
    Tokens,
    checked,
    parse_lines,
    read_text,
)
from duo_id.common.errors import UserError
from duo_id.common.files import write_text
from duo_id.common.integrity import sealed
from duo_id.evaluate.items import Item

SAMPLES = "samples.jsonl"  # in a run folder: a header line, then one item a line
ANSWERS = "answers-*.jsonl"  # beside it, one file a press: a header line, then one context and sparsity a line
SAMPLES_SCHEMA, ANSWERS_SCHEMA, VERSION = "duo_id/samples", "duo_id/answers", 1
HEADER = {
    "model",  # a hub id, or a local folder
    "revision",
    "dtype",
    "chat_template",
    "generate",
    "sink_size",
    "recent_size",
    "sparsities",
    "shares",  # for each sparsity the fraction of the KV heads that stream under its mask
    "seed",
}

TokenId = Annotated[int, Field(ge=0, lt=2**31)]  # tokenizers take no more


class _Header(Data):
    """The first line of answers."""

    press: Line
    note: str


class _Answer(Data):
    """An answered question."""

    question: Natural
    loss: float
    kl: float
    tokens: Natural
    correct: Natural
    bytes: Natural
    full_bytes: Natural
    generated: Annotated[list[TokenId], FIRST] | None


class _Failed(Data):
    """A line about a context on which a press failed."""

    task: Line
    length: Tokens
    index: Natural
    sparsity: Share
    error: str


class _Answered(Data):
    """A line about a context."""

    task: Line
    length: Tokens
    index: Natural
    sparsity: Share
    questions: Annotated[list[_Answer], FIRST]


def write_samples(path: str | Path, header: dict[str, Any], items: Sequence[Item]) -> None:
    """Write what peers are asked, whole or not at all; the same samples give the same bytes.

    Args:
        path: `samples.jsonl` of a run folder.
        header: the keys of `HEADER` and whatever else is worth telling.
        items: what is asked.
    """
    assert header.keys() >= HEADER
    assert len(header["sparsities"]) == len(header["shares"])
    head = {"schema": SAMPLES_SCHEMA, "version": VERSION} | header
    write_text(path, "".join(line + "\n" for line in [json.dumps(sealed(head)), *map(_line, items)]))


def read_answers(path: str | Path, items: Sequence[Item]) -> list[dict[str, Any]]:
    """The answers of all peers, one dict a question, press and sparsity.

    Args:
        path: a run folder, or one file of answers in it.
        items: what this evaluation asks.

    Returns:
        dicts of task, length, index, question, kind ("eviction"), heads (the press), sparsity, seed (None), loss, kl
        (nats, summed), tokens, correct, generated (tokens, or None), bytes, full_bytes (of the full cache) and note. A
        folder without answers gives none; contexts on which a press failed are counted in its note.

    Raises:
        UserError: a file cannot be read, is of another version, or answers other samples.
    """
    path = Path(path)
    files = sorted(path.glob(ANSWERS)) if path.is_dir() else [path]
    if not files:
        return []
    samples = files[0].parent / SAMPLES
    contents = _bytes(samples)
    asked, digest = set(contents.decode(errors="replace").splitlines()[1:]), hashlib.sha256(contents).hexdigest()
    known = {(item.task, item.length, item.index): item for item in items}
    same = {key for key, item in known.items() if _line(item) in asked}
    rows = []
    for file in files:
        header, answers = _read(file, digest)
        done = {(*_sample(answer), answer["sparsity"]): answer for answer in answers}  # a later line replaces
        failed = [answer for answer in done.values() if "error" in answer]
        note = header["note"]
        if failed:
            note += f"; failed on {len(failed)} contexts, first with {failed[0]['error']}"
        for answer in done.values():
            key = _sample(answer)
            if key not in same:
                why = "changed since" if key in known else "not asked here"
                raise UserError(f"{file}: sample {key[2]} of {key[0]} at {key[1]} tokens is {why}: {_again(file)}")
            if "error" not in answer:
                rows += _rows(file, known[key], header["press"], note, answer)
    return rows


def _rows(file: Path, item: Item, press: str, note: str, answer: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of one answered context."""
    rows = []
    for asked in answer["questions"]:
        number = asked["question"]
        if number not in range(len(item.questions)) or asked["tokens"] != len(item.questions[number].answer):
            raise UserError(f"{file}: question {number} of {item.task} is not the one asked here: {_again(file)}")
        inside = item.questions[number].place is not None
        row = {"task": item.task, "length": item.length, "index": item.index, "question": number}
        row |= {"kind": "eviction", "heads": press, "sparsity": answer["sparsity"], "seed": None}
        row |= {key: asked[key] for key in ("loss", "kl", "tokens", "correct", "generated", "bytes", "full_bytes")}
        rows.append(row | {"note": f"{note}; entries go where the answer begins" if inside else note})
    return rows


def _read(file: Path, digest: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Header and lines of one file; a last line that was cut short is left out."""
    text = read_text(file, LARGEST_ROWS)
    whole = text[: text.rfind("\n") + 1]
    try:
        header, *answers = [line for _, line in parse_lines(whole.split("\n"), file)]
    except ValueError as error:
        told = error if isinstance(error, UserError) else "it is empty"
        raise UserError(f"{file} holds no answers of peers ({told}): {_again(file)}") from error
    schema, version, samples = (header.get(key) for key in ("schema", "version", "samples"))
    if schema != ANSWERS_SCHEMA:
        raise UserError(f"{file} holds {schema!r:.40}, not {ANSWERS_SCHEMA}: {_again(file)}")
    if version != VERSION:
        raise UserError(
            f"{file} is of version {version!r:.40}, this is version {VERSION} of duo_id's answers: {_again(file)}"
        )
    if samples != digest:
        raise UserError(f"{file} answers other samples than {SAMPLES} beside it: {_again(file)}")
    try:
        checked(_Header, header, file)
        for answer in answers:
            checked(_Failed if "error" in answer else _Answered, answer, file)
    except UserError as error:
        raise UserError(f"{error}: {_again(file)}") from None
    return header, answers


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): give a run folder that holds it") from error


def _again(file: Path) -> str:
    return f"delete it and run make peers RUN={file.parent}"


def _sample(answer: dict[str, Any]) -> tuple[str, int, int]:
    return answer["task"], answer["length"], answer["index"]


def _line(item: Item) -> str:
    return json.dumps(item.to_json())
