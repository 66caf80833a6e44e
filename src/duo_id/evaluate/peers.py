"""Exchange with peers that run in their own environment: samples out, answers back. See docs/peers.md."""

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
from duo_id.peers.answers import ANSWERS_SCHEMA, SAMPLES, SAMPLES_SCHEMA, VERSION

ANSWERS = (
    "answers-*.jsonl"  # next to the samples, one file per press: a header line, then one context and sparsity per line
)
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
    # and "caches", shares of the full cache's bytes, where some are asked for
    "seed",
}

TokenId = Annotated[int, Field(ge=0, lt=2**31)]  # tokenizers accept no larger id


class _Header(Data):
    """The first line of an answers file."""

    press: Line
    note: str


class _QuestionAnswer(Data):
    """An answered question."""

    question: Natural
    loss: float
    kl: float
    tokens: Natural
    correct: Natural
    bytes: Natural
    full_bytes: Natural
    generated: Annotated[list[TokenId], FIRST] | None


class _FailureLine(Data):
    """A context on which a press failed."""

    task: Line
    length: Tokens
    index: Natural
    sparsity: Share | None
    cache: Share | None = None
    error: str


class _AnswerLine(Data):
    """An answered context."""

    task: Line
    length: Tokens
    index: Natural
    sparsity: Share | None
    cache: Share | None = None
    questions: Annotated[list[_QuestionAnswer], FIRST]


def write_samples(path: str | Path, header: dict[str, Any], items: Sequence[Item]) -> None:
    """Write the samples for peers, atomically; the same samples give the same bytes.

    Args:
        path: `samples.jsonl` of a run folder.
        header: the keys of `HEADER`, and any others.
        items: to be answered.
    """
    assert header.keys() >= HEADER
    assert len(header["sparsities"]) == len(header["shares"])
    full_header = {"schema": SAMPLES_SCHEMA, "version": VERSION} | header
    write_text(path, "".join(line + "\n" for line in [json.dumps(sealed(full_header)), *map(_sample_line, items)]))


def read_answers(path: str | Path, items: Sequence[Item]) -> list[dict[str, Any]]:
    """The answers of all peers, one dict per question, press and budget.

    Args:
        path: a run folder, or one answers file in it.
        items: of this evaluation.

    Returns:
        dicts of task, length, index, question, kind ("eviction"), heads (the press), sparsity or cache (the other is
        None), seed (None), loss, kl (nats, summed), tokens, correct, generated (tokens, or None), bytes, full_bytes (of
        the full cache) and note; empty for a folder without answers. Contexts on which a press failed are counted in
        its note.

    Raises:
        UserError: a file cannot be read, has another version, or answers other samples.
    """
    path = Path(path)
    files = sorted(path.glob(ANSWERS)) if path.is_dir() else [path]
    if not files:
        return []
    samples = files[0].parent / SAMPLES
    contents = _read_bytes(samples)
    sample_lines, digest = set(contents.decode(errors="replace").splitlines()[1:]), hashlib.sha256(contents).hexdigest()
    items_by_key = {(item.task, item.length, item.index): item for item in items}
    matching_keys = {key for key, item in items_by_key.items() if _sample_line(item) in sample_lines}
    rows = []
    for file in files:
        header, answers = _read_file(file, digest)
        latest = {
            (*_item_key(answer), answer["sparsity"], answer.get("cache")): answer for answer in answers
        }  # later lines win
        failures = [answer for answer in latest.values() if "error" in answer]
        note = header["note"]
        if failures:
            note += f"; failed on {len(failures)} contexts, first with {failures[0]['error']}"
        for answer in latest.values():
            key = _item_key(answer)
            if key not in matching_keys:
                reason = "changed since" if key in items_by_key else "not part of this evaluation"
                raise UserError(f"{file}: sample {key[2]} of {key[0]} at {key[1]} tokens is {reason}: {_advice(file)}")
            if "error" not in answer:
                rows += _answer_rows(file, items_by_key[key], header["press"], note, answer)
    return rows


def _answer_rows(file: Path, item: Item, press: str, note: str, answer: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of one answered context."""
    rows = []
    for measured in answer["questions"]:
        number = measured["question"]
        if number not in range(len(item.questions)) or measured["tokens"] != len(item.questions[number].answer):
            raise UserError(
                f"{file}: question {number} of {item.task} differs from the one in this evaluation: {_advice(file)}"
            )
        in_context = item.questions[number].place is not None
        row = {"task": item.task, "length": item.length, "index": item.index, "question": number}
        row |= {"kind": "eviction", "heads": press, "sparsity": answer["sparsity"], "seed": None}
        row |= {"cache": answer.get("cache")}
        row |= {key: measured[key] for key in ("loss", "kl", "tokens", "correct", "generated", "bytes", "full_bytes")}
        rows.append(row | {"note": f"{note}; entries are evicted where the answer begins" if in_context else note})
    return rows


def _read_file(file: Path, digest: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Header and lines of one file; a truncated last line is dropped."""
    text = read_text(file, LARGEST_ROWS)
    complete_lines = text[: text.rfind("\n") + 1]
    try:
        header, *answers = [line for _, line in parse_lines(complete_lines.split("\n"), file)]
    except ValueError as error:
        reason = error if isinstance(error, UserError) else "it is empty"
        raise UserError(f"{file} holds no answers from peers ({reason}): {_advice(file)}") from error
    schema, version, samples = (header.get(key) for key in ("schema", "version", "samples"))
    if schema != ANSWERS_SCHEMA:
        raise UserError(f"{file} holds {schema!r:.40}, not {ANSWERS_SCHEMA}: {_advice(file)}")
    if version != VERSION:
        raise UserError(f"{file} has version {version!r:.40}, this duo_id reads version {VERSION}: {_advice(file)}")
    if samples != digest:
        raise UserError(f"{file} answers other samples than the {SAMPLES} next to it: {_advice(file)}")
    try:
        checked(_Header, header, file)
        for answer in answers:
            checked(_FailureLine if "error" in answer else _AnswerLine, answer, file)
    except UserError as error:
        raise UserError(f"{error}: {_advice(file)}") from None
    return header, answers


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): give a run folder that contains it") from error


def _advice(file: Path) -> str:
    return f"delete it and run duo-id peers {file.parent}"


def _item_key(answer: dict[str, Any]) -> tuple[str, int, int]:
    return answer["task"], answer["length"], answer["index"]


def _sample_line(item: Item) -> str:
    return json.dumps(item.to_json())
