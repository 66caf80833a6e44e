"""Where the rows of published data sets come from: a local folder with the hub's files, or the hub itself."""

import json
import zipfile
from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import datasets
import pyarrow.parquet as pq
from huggingface_hub import hf_hub_download

from duo_id.errors import UserError

Row = dict[str, Any]
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


def read_rows(path: Path) -> list[Row]:
    """The rows of a jsonl, json (a list) or parquet file.

    Raises:
        UserError: it is not what its name says, or does not hold rows.
    """
    try:
        if path.suffix == ".parquet":
            return pq.read_table(path).to_pylist()
        text = path.read_text(encoding="utf-8")
        rows = _lines(text.split("\n")) if path.suffix == ".jsonl" else json.loads(text)
    except (OSError, ValueError) as error:
        raise UserError(f"data.path: {path} cannot be read: {_one_line(error)}") from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise UserError(f"data.path: {path} holds no rows")
    if not rows:
        raise UserError(f"data.path: {path} holds no rows")
    return rows


def texts(task: str, row: Row, key: str) -> tuple[str, ...]:
    """The texts of a column that holds one or several; blank ones, which any answer would contain, are left out.

    Raises:
        UserError: the column is missing or empty, or holds something else.
    """
    found = row.get(key)
    if not found:
        raise UserError(f"tasks={task}: the data has no {key}")
    found = [found] if isinstance(found, str) else found
    if not isinstance(found, list) or not all(isinstance(text, str | int | float) for text in found):
        raise UserError(f"tasks={task}: {key} is {found!r}, not a text or a list of texts")
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
    try:
        contents = json.loads(found[0].read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"data.path: {found[0]} cannot be read: {_one_line(error)}") from error
    if not isinstance(contents, dict):
        raise UserError(f"data.path: {found[0]} holds no object")
    return contents


def from_hub(repository: str, read: Callable[[], list[Row]]) -> list[Row]:
    """What `read` gets from a data set of the hub.

    Raises:
        UserError: it gets nothing; the message says how to do without the hub.
    """
    try:
        return read()
    except Exception as error:  # network, hub, data set and split: many types
        raise UserError(
            f"huggingface.co/datasets/{repository} cannot be loaded: {_one_line(error)} Download it elsewhere and give "
            "the folder: data.path=FOLDER, see docs/benchmarks.md"
        ) from error


def hub_zip(repository: str, archive: str, member: str) -> list[Row]:
    """The rows of a jsonl file in an archive on the hub, which is kept in the hub's cache."""
    path = hf_hub_download(repository, archive, repo_type="dataset")
    with zipfile.ZipFile(path) as opened, opened.open(member) as file:
        return _lines(line.decode() for line in file)


def hub_split(repository: str, split: str, folder: str | None = None) -> list[Row]:
    """The rows of a split, of all files or of those in `folder`."""
    return list(datasets.load_dataset(repository, data_dir=folder, split=split))


def _lines(lines: Iterable[str]) -> list[Row]:
    filled: Iterator[str] = (line for line in lines if line.strip())
    return [json.loads(line) for line in filled]


def _one_line(error: Exception) -> str:
    text = " ".join(str(error.__cause__ or error).split())
    return text if text.endswith(".") else f"{text}."
