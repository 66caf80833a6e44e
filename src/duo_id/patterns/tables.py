"""Tables of numbers, read from and written to text files; errors name the file and the row."""

import json
import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from duo_id.common.documents import read_text
from duo_id.common.errors import UserError

NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?", re.ASCII)  # Python's own allows 1_000 and other digits


def read_tsv(path: Path) -> list[list[float]]:
    """The rows of a tab-separated table; blank lines are skipped.

    Raises:
        UserError: it cannot be read, a cell is not a finite number, or rows differ in length.
    """
    lines = enumerate(read_text(path).splitlines(), start=1)
    return number_rows(f"{path}, line", ((number, line.split("\t")) for number, line in lines if line.strip()))


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
        raise UserError(f"{where} 1: empty, a pattern has one row per layer and one column per KV head")
    return table


def as_float(cell: Any) -> float:
    """The number in a cell, in ASCII; NaN if it is not one."""
    try:
        return float(cell) if not isinstance(cell, str) or NUMBER.fullmatch(cell.strip()) else math.nan
    except (TypeError, ValueError, OverflowError):
        return math.nan


def exact_rows(heads: Tensor) -> list[list[float]]:
    """Rows of numbers with nine significant digits, enough to distinguish any two float32 values."""
    return [[float(f"{value:.9g}") for value in row] for row in heads.tolist()]


def tsv(heads: Tensor) -> str:
    """A table (rows, columns) as tab-separated text, from which float32 is restored bit for bit."""
    rows = exact_rows(heads) if heads.is_floating_point() else heads.tolist()
    return "".join("\t".join(map(str, row)) + "\n" for row in rows)


def json_text(contents: dict[str, Any]) -> str:
    """JSON with each list of numbers on one line; strings cannot change, as they contain no literal line breaks."""
    text = json.dumps(contents, indent=1, allow_nan=False)
    return re.sub(r"\[\n[\s\d.,eE+-]*\]", lambda row: re.sub(r"\s+", " ", row[0]), text) + "\n"
