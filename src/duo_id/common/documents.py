"""Files that others may have written, as data: how much of them is read, what JSON may hold, and schemas for it.

Every JSON file goes through here. What is no data of ours ends in one line that names the file: a size that no such
file has, deep nesting, numbers that are not finite or that no int64 holds, half a character, another shape than the
schema's. Of a key that stands twice the last counts, as everywhere in Python.
"""

import json
import re
from collections.abc import Iterable
from math import isfinite
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, FailFast, Field, ValidationError
from pydantic_core import from_json

from duo_id.common.errors import UserError
from duo_id.common.integrity import AGAIN, SEAL, unsealed

LARGEST = 2**24  # bytes of a file that describes something: those of the largest models have less than a tenth of it
LARGEST_ROWS = 2**30  # bytes of a file with a row for each sample, such as results
MOST_TOKENS = 2**24  # of a context or a window
SHOWN = 60  # characters of a value in a message
PLACE = re.compile(r"line (\d+) column (\d+)$")
HALF = re.compile(r"\\(u[dD][89abAB]\w\w\\u[dD][c-fC-F]\w\w|u[dD][89a-fA-F]\w\w|.)", re.DOTALL)  # after a whole one
KINDS = {  # what pydantic calls a wrong type, in the words of JSON
    "dict_type": "no object",
    "model_type": "no object",
    "model_attributes_type": "no object",
    "list_type": "no list",
    "string_type": "no text",
    "int_type": "no whole number",
    "float_type": "no number",
    "bool_type": "neither true nor false",
    "finite_number": "no finite number",
}
Schema = TypeVar("Schema", bound=BaseModel)


class Data(BaseModel):
    """A schema of data: types as JSON has them, nothing converted, other keys left out."""

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False, hide_input_in_errors=True)


class _First(FailFast):
    """Can be hashed, as types with `| None` behind them need it."""

    __hash__ = object.__hash__


Line = Annotated[str, Field(max_length=1000)]  # a name
Natural = Annotated[int, Field(ge=0, le=2**53)]
Tokens = Annotated[int, Field(ge=0, le=MOST_TOKENS)]
Share = Annotated[float, Field(ge=0, le=1)]
NonNegative = Annotated[float, Field(ge=0)]
FIRST = _First()  # in the type of a list of many: the first error is enough


def read_text(path: str | Path, largest: int = LARGEST) -> str:
    """The text of a file, without the mark that some editors put in front.

    Raises:
        UserError: it cannot be read, is larger than `largest` bytes, or is not UTF-8.
    """
    path = Path(path)
    try:
        if path.exists() and not path.is_file():
            raise UserError(f"{path} is {'a folder' if path.is_dir() else 'no file'}: give a file")
        with open(path, "rb") as file:
            contents = file.read(largest + 1)  # a file may grow, or say nothing of its size
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error})") from error
    if len(contents) > largest:
        size = max(path.stat().st_size, len(contents))
        raise UserError(f"{path} has {size:,} bytes, more than the {largest:,} that such a file may have")
    try:
        return contents.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(f"{path} is not a text file in UTF-8") from None


def read_json(path: str | Path, largest: int = LARGEST, mend: bool = False) -> Any:
    """What a JSON file holds; `mend` as for `parse_json`.

    Raises:
        UserError: it cannot be read or is no such JSON as this module takes.
    """
    return parse_json(read_text(path, largest), path, mend=mend)


def read_object(path: str | Path, largest: int = LARGEST, mend: bool = False) -> dict[str, Any]:
    """What a JSON file holds, if that is an object.

    Raises:
        UserError: as of `read_json`, or it is something else.
    """
    return as_object(read_json(path, largest, mend), path)


def as_object(contents: Any, where: str | Path) -> dict[str, Any]:
    """The contents of a file, if they are an object.

    Raises:
        UserError: they are something else.
    """
    if not isinstance(contents, dict):
        raise UserError(f"{where}: expected a JSON object, found {type(contents).__name__}")
    return contents


def parse_lines(
    lines: Iterable[str], where: str | Path, mend: bool = False, advice: str = AGAIN
) -> list[tuple[int, dict[str, Any]]]:
    """The objects in lines of JSON, with the numbers of these; blank ones are left out. Arguments as of `parse_json`.

    Raises:
        UserError: as of `parse_json`, or a line is something else.
    """
    numbered = ((number, line) for number, line in enumerate(lines, start=1) if line.strip())
    return [
        (number, as_object(parse_json(line, where, number, mend, advice), f"{where}, line {number}"))
        for number, line in numbered
    ]


def parse_json(text: str, where: str | Path, line: int = 1, mend: bool = False, advice: str = AGAIN) -> Any:
    r"""What JSON says.

    Args:
        text: the JSON.
        where: it stands, for messages.
        line: number of its first line there.
        mend: let half a character (`\ud800`), which models may generate and no file can hold, be a question mark.
        advice: what to do about a text that its checksum does not fit.

    Raises:
        UserError: it is not JSON, is nested too deeply, or has a number that no float64 or int64 holds.
    """
    whole = text
    if mend and "\\ud" in text.lower():
        text = HALF.sub(lambda found: "?" if len(found[0]) == 6 and found[0][2] in "dD" else found[0], text)
    try:
        contents = from_json(text)
    except ValueError as error:
        place, reason = PLACE.search(str(error)), str(error).partition(" at line ")[0]
        at = f", line {int(place[1]) + line - 1}, column {place[2]}" if place else ""
        raise UserError(f"{where}{at}: not JSON ({reason})") from None
    left = [contents]
    while left:
        one = left.pop()
        if isinstance(one, dict):
            left += one.values()
        elif isinstance(one, list):
            left += one
        elif isinstance(one, int) and not -(2**63) <= one < 2**63:
            raise UserError(f"{where}: {excerpt(one)} is beyond 64 bits")
        elif isinstance(one, float) and not isfinite(one):
            raise UserError(f"{where}: {one} is no finite number")
    stands = where if line == 1 else f"{where}, line {line}"
    if text != whole:  # whose checksum is that of the halves
        unsealed(json.loads(whole), stands, advice)
        if isinstance(contents, dict):
            contents.pop(SEAL, None)
    return unsealed(contents, stands, advice)


def checked(schema: type[Schema], contents: Any, where: str | Path, under: str = "") -> Schema:
    """Contents as a schema has them.

    Args:
        schema: of them.
        contents: plain values.
        where: they stand, for messages.
        under: the key that they have there.

    Raises:
        UserError: `where`, and the first thing that the schema does not allow.
    """
    try:
        return schema.model_validate(contents)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        missing = first["type"] == "missing"
        path = [str(part) for part in (*filter(None, [under]), *(first["loc"][:-1] if missing else first["loc"]))]
        place = excerpt(".".join(path), 4 * SHOWN).strip("'\"")
        if missing:
            kin = [one["loc"] for one in error.errors(include_url=False) if one["type"] == "missing"]
            lacking = [str(loc[-1]) for loc in kin if loc[:-1] == first["loc"][:-1]]
            owner = f"{where}: {place}" if place else str(where)
            raise UserError(f"{owner} lacks {', '.join(lacking)}") from None
        reason = KINDS.get(first["type"], re.sub(r"^\w+ should", "must", first["msg"]))
        value = f"={excerpt(first['input'])}" if place else ""
        told = f"is {reason}" if first["type"] in KINDS else reason
        raise UserError(f"{where}: {f'{place}{value} {told}'.strip()}") from None


def excerpt(value: Any, most: int = SHOWN) -> str:
    """A value on one line, cut off where it is long."""
    if isinstance(value, dict | list):
        return "{...}" if isinstance(value, dict) else "[...]"
    text = repr(value)
    return text if len(text) <= most else f"{text[: most - 1]}…"
