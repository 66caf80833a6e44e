"""Read files that others may have written as data: limits on their size, strict JSON, and schemas for it.

Every JSON file goes through here. Invalid data ends in one line that names the file: excessive size, deep nesting,
numbers that are not finite or do not fit int64, lone surrogates, or a shape that the schema does not allow. The last of
duplicate keys counts, as everywhere in Python.
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
from duo_id.common.integrity import RESTORE_ADVICE, SEAL, unsealed

LARGEST = 2**24  # bytes of a file of metadata: those of the largest models have less than a tenth of it
LARGEST_ROWS = 2**30  # bytes of a file with one row per sample, such as results
MOST_TOKENS = 2**24  # of a context or a window
MAX_SHOWN = 60  # characters of a value in a message
POSITION = re.compile(r"line (\d+) column (\d+)$")
# A pair of surrogates, a lone one (the only match of six characters), or any other escape, such as a backslash.
LONE_SURROGATE = re.compile(r"\\(u[dD][89abAB]\w\w\\u[dD][c-fC-F]\w\w|u[dD][89a-fA-F]\w\w|.)", re.DOTALL)
TYPE_ERRORS = {  # pydantic's errors about a wrong type, in JSON's terms
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
    """A schema of data: JSON's types, no conversion, unknown keys ignored."""

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False, hide_input_in_errors=True)


class _HashableFailFast(FailFast):
    """`FailFast` that can be hashed, as types with `| None` require."""

    __hash__ = object.__hash__


Line = Annotated[str, Field(max_length=1000)]  # a name
Natural = Annotated[int, Field(ge=0, le=2**53)]
Tokens = Annotated[int, Field(ge=0, le=MOST_TOKENS)]
Share = Annotated[float, Field(ge=0, le=1)]
NonNegative = Annotated[float, Field(ge=0)]
FIRST = _HashableFailFast()  # in the type of a long list: the first error is enough


def read_text(path: str | Path, largest: int = LARGEST) -> str:
    """The text of a file, without a byte order mark.

    Raises:
        UserError: it cannot be read, is larger than `largest` bytes, or is not UTF-8.
    """
    path = Path(path)
    try:
        if path.exists() and not path.is_file():
            raise UserError(f"{path} is {'a folder' if path.is_dir() else 'no file'}: give a file")
        with open(path, "rb") as file:
            contents = file.read(largest + 1)  # its size may be unknown, or grow
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error})") from error
    if len(contents) > largest:
        size = max(path.stat().st_size, len(contents))
        raise UserError(f"{path} has {size:,} bytes, more than the limit of {largest:,} for such a file")
    try:
        return contents.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(f"{path} is not a text file in UTF-8") from None


def read_json(path: str | Path, largest: int = LARGEST, replace_surrogates: bool = False) -> Any:
    """The contents of a JSON file; see `parse_json` for `replace_surrogates`.

    Raises:
        UserError: it cannot be read, or is not JSON that `parse_json` accepts.
    """
    return parse_json(read_text(path, largest), path, replace_surrogates=replace_surrogates)


def read_object(path: str | Path, largest: int = LARGEST, replace_surrogates: bool = False) -> dict[str, Any]:
    """The contents of a JSON file that holds an object.

    Raises:
        UserError: as for `read_json`, or it does not hold an object.
    """
    return as_object(read_json(path, largest, replace_surrogates), path)


def as_object(contents: Any, where: str | Path) -> dict[str, Any]:
    """The contents of a file, which must be an object.

    Raises:
        UserError: they are not.
    """
    if not isinstance(contents, dict):
        raise UserError(f"{where}: expected a JSON object, found {type(contents).__name__}")
    return contents


def parse_lines(
    lines: Iterable[str], where: str | Path, replace_surrogates: bool = False, advice: str = RESTORE_ADVICE
) -> list[tuple[int, dict[str, Any]]]:
    """The objects in lines of JSON with their line numbers; blank lines are skipped. Arguments as for `parse_json`.

    Raises:
        UserError: as for `parse_json`, or a line does not hold an object.
    """
    numbered = ((number, line) for number, line in enumerate(lines, start=1) if line.strip())
    return [
        (number, as_object(parse_json(line, where, number, replace_surrogates, advice), f"{where}, line {number}"))
        for number, line in numbered
    ]


def parse_json(
    text: str, where: str | Path, line: int = 1, replace_surrogates: bool = False, advice: str = RESTORE_ADVICE
) -> Any:
    r"""The value of a JSON text, without its checksum.

    Args:
        text: the JSON.
        where: its file, for messages.
        line: number of its first line in the file.
        replace_surrogates: replace lone surrogates (`\ud800`), which models may generate and UTF-8 cannot encode, by
            question marks.
        advice: what to do if the checksum differs, for messages.

    Raises:
        UserError: it is not JSON, is nested too deeply, has a number that does not fit float64 or int64, or differs
            from its checksum.
    """
    original = text
    if replace_surrogates and "\\ud" in text.lower():
        text = LONE_SURROGATE.sub(lambda match: "?" if len(match[0]) == 6 and match[0][2] in "dD" else match[0], text)
    try:
        contents = from_json(text)
    except ValueError as error:
        position, reason = POSITION.search(str(error)), str(error).partition(" at line ")[0]
        at = f", line {int(position[1]) + line - 1}, column {position[2]}" if position else ""
        raise UserError(f"{where}{at}: not JSON ({reason})") from None
    pending = [contents]
    while pending:
        value = pending.pop()
        if isinstance(value, dict):
            pending += value.values()
        elif isinstance(value, list):
            pending += value
        elif isinstance(value, int) and not -(2**63) <= value < 2**63:
            raise UserError(f"{where}: {excerpt(value)} is beyond 64 bits")
        elif isinstance(value, float) and not isfinite(value):
            raise UserError(f"{where}: {value} is no finite number")
    location = where if line == 1 else f"{where}, line {line}"
    if text != original:  # the checksum is of the text with its surrogates
        unsealed(json.loads(original), location, advice)
        if isinstance(contents, dict):
            contents.pop(SEAL, None)
    return unsealed(contents, location, advice)


def checked(schema: type[Schema], contents: Any, where: str | Path, under: str = "") -> Schema:
    """The contents as an instance of a schema.

    Args:
        schema: the schema.
        contents: plain values.
        where: their file, for messages.
        under: their key in the file, for messages.

    Raises:
        UserError: the schema does not allow them; the message begins with `where` and names the first mistake.
    """
    try:
        return schema.model_validate(contents)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        missing = first["type"] == "missing"
        path = [str(part) for part in (*filter(None, [under]), *(first["loc"][:-1] if missing else first["loc"]))]
        key = excerpt(".".join(path), 4 * MAX_SHOWN).strip("'\"")
        if missing:
            locations = [other["loc"] for other in error.errors(include_url=False) if other["type"] == "missing"]
            missing_keys = [str(location[-1]) for location in locations if location[:-1] == first["loc"][:-1]]
            parent = f"{where}: {key}" if key else str(where)
            raise UserError(f"{parent} lacks {', '.join(missing_keys)}") from None
        reason = TYPE_ERRORS.get(first["type"], re.sub(r"^\w+ should", "must", first["msg"]))
        value = f"={excerpt(first['input'])}" if key else ""
        mistake = f"is {reason}" if first["type"] in TYPE_ERRORS else reason
        raise UserError(f"{where}: {f'{key}{value} {mistake}'.strip()}") from None


def excerpt(value: Any, limit: int = MAX_SHOWN) -> str:
    """A value on one line, truncated to `limit` characters."""
    if isinstance(value, dict | list):
        return "{...}" if isinstance(value, dict) else "[...]"
    text = repr(value)
    return text if len(text) <= limit else f"{text[: limit - 1]}…"
