"""Read RULER's published data, in the format of its authors' scripts or that of the hub."""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field

from duo_id.common.documents import LARGEST_ROWS, Data, Line, Tokens, checked, parse_lines, read_text
from duo_id.common.errors import UserError, check, one_line

HUB = "simonjegou/ruler"  # the data set that NVIDIA/kvpress evaluates on: 4096, 8192 and 16384 tokens
SUFFIXES = (".jsonl", ".parquet")
Answers = str | Annotated[list[str | int | float], Field(min_length=1)]


@dataclass(frozen=True)
class Sample:
    """A row as text.

    Attributes:
        context: read first.
        question: follows the context.
        cue: the beginning of the answer, which the model continues.
        references: right answers; blank ones are excluded, because every answer contains them.
        max_new_tokens: of an answer; None if the row has no limit.
    """

    context: str
    question: str
    cue: str
    references: tuple[str, ...]
    max_new_tokens: int | None


class Row(Data):
    """Optional columns of both formats."""

    task: Line | None = None
    max_new_tokens: Tokens | None = None
    answer_prefix: str | None = None


class ScriptRow(Row):
    """A row of the authors' scripts."""

    input: str
    outputs: Answers


class HubRow(Row):
    """A row of the hub."""

    context: str
    question: str
    answer: Answers


def read_ruler(name: str, folder: str | None, length: int) -> list[Sample]:
    """One task of RULER at one length.

    Args:
        name: RULER's name of the task.
        folder: a local folder; its subfolder named `length` contains a folder per task with jsonl files, as written by
            the authors' scripts, or files with all tasks, as on the hub; None: the hub.
        length: in tokens, by the tokenizer that the data was generated with.

    Raises:
        UserError: the data is missing or invalid.
    """
    rows = _rows_from_hub(name, length) if folder is None else _rows_from_folder(name, folder, length)
    check(
        bool(rows),
        f"tasks=ruler-data/{name}: no data of lengths={length} in {HUB if folder is None else f'data.path={folder}'}: "
        "choose other lengths or tasks, or generate it, see docs/benchmarks.md",
    )
    return rows


def _rows_from_hub(name: str, length: int) -> list[Sample]:
    where = f"huggingface.co/datasets/{HUB}"
    try:
        rows = list(datasets.load_dataset(HUB, data_dir=str(length), split="test"))
    except Exception as error:  # errors of the network, the hub and the data set have many types
        raise UserError(
            f"{where} ({length} tokens) cannot be loaded: {_reason(error)} Download it elsewhere and give its folder: "
            "data.path=FOLDER, see docs/benchmarks.md"
        ) from error
    numbered = ((f"{where} ({length} tokens), row {number}", row) for number, row in enumerate(rows, start=1))
    return _samples(numbered, name)


def _rows_from_folder(name: str, folder: str, length: int) -> list[Sample]:
    """The rows of the task's own files, else its rows in the files with all tasks."""
    root = Path(folder).expanduser().resolve()
    check(root.is_dir(), f"data.path={folder}: no such folder")
    files = sorted(path for path in root.rglob("*") if path.suffix in SUFFIXES)
    of_task = [path for path in files if name in (path.stem, path.parent.name) and str(length) in path.parts]
    of_all = [path for path in files if str(length) in (path.stem, path.parent.name)]
    for previous, path in pairwise(of_task or of_all):
        unique = path.parent == previous.parent and path.stem != previous.stem
        check(unique, f"data.path={folder} has {name} twice, in {previous} and in {path}: give one of them")
    numbered = (pair for path in of_task or of_all for pair in _read_rows(path))
    return _samples(numbered, None if of_task else name)


def _samples(numbered: Iterable[tuple[str, dict[str, Any]]], task: str | None) -> list[Sample]:
    """The samples of a task, or all, among rows with their locations for messages; all rows are checked."""
    samples = []
    for where, contents in numbered:
        schema: type[ScriptRow | HubRow] = ScriptRow if "input" in contents else HubRow
        row = checked(schema, contents, where)
        if task in (None, row.task):
            samples.append(_sample(row, where))
    return samples


def _sample(row: ScriptRow | HubRow, where: str) -> Sample:
    if isinstance(row, HubRow):
        gap = "" if row.context[-1:].isspace() or row.question[:1].isspace() else "\n"
        context, question, answers = row.context, gap + row.question, row.answer
    else:  # in every task's template, the question is the last line
        end = row.input.rstrip().rfind("\n")
        check(end >= 0, f"{where}: its input is a single line, so the question cannot be split from the context")
        context, question, answers = row.input[:end], row.input[end:], row.outputs
    texts = [answers] if isinstance(answers, str) else map(str, answers)
    references = tuple(text for text in texts if text.strip())
    return Sample(context, question, row.answer_prefix or "", references, row.max_new_tokens)


def _read_rows(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """The rows of a file, each with its location for messages."""
    try:
        if path.suffix == ".parquet":
            rows = list(enumerate(pq.read_table(path).to_pylist(), start=1))
        else:
            rows = parse_lines(read_text(path, LARGEST_ROWS).split("\n"), path)
    except (OSError, ValueError, pa.ArrowException) as error:
        raise UserError(f"data.path: {path} cannot be read: {_reason(error)}") from error
    check(bool(rows), f"data.path: {path} has no rows")
    unit = "row" if path.suffix == ".parquet" else "line"
    return [(f"data.path: {path}, {unit} {number}", row) for number, row in rows]


def _reason(error: Exception) -> str:
    return one_line(error.__cause__ or error).removesuffix(".") + "."
