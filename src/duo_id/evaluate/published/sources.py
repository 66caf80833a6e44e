"""Where the rows of published data sets come from: a local folder with the hub's files, or the hub itself."""

import zipfile
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
from huggingface_hub import hf_hub_download
from pydantic import Field

from duo_id.common import documents
from duo_id.common.documents import LARGEST_ROWS, Data, checked, parse_lines, read_object, read_text
from duo_id.common.errors import UserError, one_line

Row = dict[str, Any]
Schema = Callable[[Row], type[Data]]  # of rows, by the columns that they have
Texts = str | Annotated[list[str | int | float], Field(min_length=1)]  # of a column with right answers
SUFFIXES = (".jsonl", ".json", ".parquet")


def local_files(folder: str, name: str, parts: bool = True, within: str | None = None) -> list[Path]:
    """The data files below `folder` that are called `name`, or lie in a folder that is, sorted.

    Args:
        folder: given by the user.
        name: without suffix.
        parts: whether a folder called `name` counts, the files of which are parts.
        within: the name of a folder that must be on the file's path.

    Raises:
        UserError: `folder` is no folder, or has such files in several places.
    """
    root = Path(folder).expanduser().resolve()
    if not root.is_dir():
        raise UserError(f"data.path={folder}: no such folder")
    files = sorted(path for path in root.rglob("*") if path.suffix in SUFFIXES)
    files = [path for path in files if path.stem == name or (parts and path.parent.name == name)]
    files = [path for path in files if within is None or within in path.parts]
    places = sorted({path.parent for path in files})
    if len(places) > 1:
        raise UserError(f"data.path={folder} has {name} twice, in {places[0]} and in {places[1]}: give one of them")
    twins = [path for path, after in pairwise(files) if path.stem == after.stem]
    if twins:
        raise UserError(f"data.path={folder} has {name} twice, as {twins[0].stem} in several formats: give one of them")
    return files


def read_rows(path: Path, schema: Schema) -> list[Row]:
    """The rows of a jsonl, json (a list) or parquet file.

    Raises:
        UserError: it is not what its name says, or a row is not what the schema says; the message has its line, or its
            number where rows have no lines.
    """
    try:
        if path.suffix == ".parquet":
            numbered = list(enumerate(pq.read_table(path).to_pylist(), start=1))
        elif path.suffix == ".jsonl":
            numbered = parse_lines(read_text(path, LARGEST_ROWS).split("\n"), path)
        else:
            contents = documents.read_json(path, LARGEST_ROWS)
            numbered = list(enumerate(contents if isinstance(contents, list) else [], start=1))
    except (OSError, ValueError, pa.ArrowException) as error:
        raise UserError(f"data.path: {path} cannot be read: {_one_line(error)}") from error
    if not numbered:
        raise UserError(f"data.path: {path} holds no rows")
    unit = "line" if path.suffix == ".jsonl" else "row"
    for number, row in numbered:
        _check(row, schema, f"data.path: {path}, {unit} {number}")
    return [row for _, row in numbered]


def texts(row: Row, key: str) -> tuple[str, ...]:
    """The texts of a column that holds one or several; blank ones, which any answer would contain, are left out."""
    found = [row[key]] if isinstance(row[key], str) else row[key]
    return tuple(str(text) for text in found if str(text).strip())


def positive(what: str, number: Any) -> int:
    """A whole number of tokens.

    Raises:
        UserError: it is none, or not positive.
    """
    if not isinstance(number, int) or isinstance(number, bool) or number < 1:
        raise UserError(f"data.path: {what} is {number!r}, not a number of tokens")
    return number


def read_json(folder: str | None, name: str) -> dict[str, Any]:
    """The object in the file `name` below a local folder; empty if there is none.

    Raises:
        UserError: the file holds something else.
    """
    found = [] if folder is None else sorted(Path(folder).expanduser().rglob(name))
    if not found:
        return {}
    return read_object(found[0])


def from_hub(repository: str, read: Callable[[], list[Row]], schema: Schema) -> list[Row]:
    """What `read` gets from a data set of the hub.

    Raises:
        UserError: it gets nothing, and the message says how to do without the hub; or a row is not of the schema.
    """
    try:
        rows = read()
    except Exception as error:  # network, hub, data set and split: many types
        raise UserError(
            f"huggingface.co/datasets/{repository} cannot be loaded: {_one_line(error)} Download it elsewhere and give "
            "the folder: data.path=FOLDER, see docs/benchmarks.md"
        ) from error
    for number, row in enumerate(rows, start=1):
        _check(row, schema, f"huggingface.co/datasets/{repository}, row {number}")
    return rows


def hub_zip(repository: str, archive: str, member: str) -> list[Row]:
    """The rows of a jsonl file in an archive on the hub, which is kept in the hub's cache."""
    path = hf_hub_download(repository, archive, repo_type="dataset")
    with zipfile.ZipFile(path) as opened, opened.open(member) as file:
        lines = file.read(LARGEST_ROWS).decode().split("\n")
    return [row for _, row in parse_lines(lines, f"{archive}/{member}")]


def hub_split(repository: str, split: str, folder: str | None = None) -> list[Row]:
    """The rows of a split, of all files or of those in `folder`."""
    return list(datasets.load_dataset(repository, data_dir=folder, split=split))


def _check(row: Any, schema: Schema, where: str) -> None:
    checked(schema(row) if isinstance(row, dict) else Data, row, where)


def _one_line(error: Exception) -> str:
    text = one_line(error.__cause__ or error)
    return text if text.endswith(".") else f"{text}."
