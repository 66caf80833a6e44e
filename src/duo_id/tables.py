"""Numbers out of text files and into them; what cannot be read names the file and the row at fault."""

import json
import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from duo_id.errors import UserError
from duo_id.integrity import AGAIN, unsealed


def read_text(path: Path) -> str:
    """The text of a file.

    Raises:
        UserError: it is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise UserError(f"{path} is not a text file") from None


def read_tsv(path: Path) -> list[list[float]]:
    """The rows of a table with tabs between its columns; blank lines are skipped.

    Raises:
        UserError: a cell is not a finite number, or rows differ in length.
    """
    lines = enumerate(read_text(path).splitlines(), start=1)
    return number_rows(f"{path}, line", [(number, line.split("\t")) for number, line in lines if line.strip()])


def read_json(path: Path) -> Any:
    """What a JSON file holds, without its checksum.

    Raises:
        UserError: it is not JSON, or its checksum is another.
    """
    try:
        return unsealed(json.loads(read_text(path)), path, AGAIN)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}, line {error.lineno}, column {error.colno}: not JSON ({error.msg})") from None


def read_object(path: Path) -> dict[str, Any]:
    """What a JSON file holds, if that is an object.

    Raises:
        UserError: it is not JSON, or something else.
    """
    contents = read_json(path)
    if not isinstance(contents, dict):
        raise UserError(f"{path}: expected a JSON object, found {type(contents).__name__}")
    return contents


def number_rows(where: str, rows: Iterable[tuple[int, Sequence[Any]]]) -> list[list[float]]:
    """Numbered rows of cells as floats; the message of an error starts with `where` and the row's number."""
    table: list[list[float]] = []
    for number, cells in rows:
        for column, cell in enumerate(cells, start=1):
            if not math.isfinite(as_float(cell)):
                raise UserError(f"{where} {number}, column {column}: {str(cell)[:40]!r} is not a finite number")
        table.append([float(cell) for cell in cells])
        if len(cells) != len(table[0]):
            raise UserError(f"{where} {number} has {len(cells)} columns, but the first has {len(table[0])}")
    if not table or not table[0]:
        raise UserError(f"{where} 1: nothing there, a pattern has one row a layer and one column a KV head")
    return table


def as_float(cell: Any) -> float:
    """The number in a cell; NaN where there is none."""
    try:
        return float(cell)
    except (TypeError, ValueError, OverflowError):
        return math.nan


def exact_rows(heads: Tensor) -> list[list[float]]:
    """Rows of numbers with nine significant digits, which is what tells any two float32 apart."""
    return [[float(f"{value:.9g}") for value in row] for row in heads.tolist()]


def tsv(heads: Tensor) -> str:
    """A table (rows, columns) with tabs between its columns; float32 comes back bit for bit."""
    rows = exact_rows(heads) if heads.is_floating_point() else heads.tolist()
    return "".join("\t".join(map(str, row)) + "\n" for row in rows)


def json_text(contents: dict[str, Any]) -> str:
    """JSON with one row of numbers a line; only real line breaks are closed up, so no string can be touched."""
    text = json.dumps(contents, indent=1, allow_nan=False)
    return re.sub(r"\[\n[\s\d.,eE+-]*\]", lambda row: re.sub(r"\s+", " ", row[0]), text) + "\n"
