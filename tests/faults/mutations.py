"""How files break: by a disk, by an editor, and by a program that wrote something else."""

import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

Break = Callable[[bytes, random.Random], bytes]
Place = tuple[str | int, ...]
AGAIN = "\x00again"  # marks a key that is written a second time
DEEP = 100_000  # brackets inside each other
LONG = int("9" * 400)  # no float holds it
LONGER = "9" * 5000  # digits that Python does not read
OTHERS: tuple[Any, ...] = (
    None,
    True,
    "abc",
    "",
    "\ud800",
    "\x1b[31m\n☃",
    [],
    {},
    [[0.5]],
    {"a": {"b": 1}},
    -1,
    1.5,
    float("nan"),
    float("inf"),
    -float("inf"),
    10**22,
    LONG,
    "LONGER",
    "DEEP",
)
CELLS = ("abc", "nan", "inf", "", "-1", "1e400", "☃", "1,5", "10000000000000000000000", "0x1", "None", " ", '"')


def _bit(data: bytes, rng: random.Random) -> bytes:
    place = rng.randrange(len(data))
    return data[:place] + bytes([data[place] ^ 1 << rng.randrange(8)]) + data[place + 1 :]


def _block(data: bytes, rng: random.Random) -> bytes:
    size = min(len(data), rng.choice((1, 16, 512, 4096)))
    place = rng.randrange(len(data) - size + 1)
    return data[:place] + bytes(size) + data[place + size :]


def _lines(change: Callable[[list[bytes], random.Random], list[bytes]]) -> Break:
    return lambda data, rng: b"".join(change(data.splitlines(keepends=True), rng))


def _without(lines: list[bytes], rng: random.Random) -> list[bytes]:
    place = rng.randrange(len(lines))
    return lines[:place] + lines[place + 1 :]


def _twice(lines: list[bytes], rng: random.Random) -> list[bytes]:
    place = rng.randrange(len(lines))
    return [*lines[: place + 1], lines[place], *lines[place + 1 :]]


BYTES: dict[str, Break] = {
    "emptied": lambda data, rng: b"",
    "cut off": lambda data, rng: data[: rng.randrange(1, len(data))],
    "cut by a byte": lambda data, rng: data[:-1],
    "a bit flipped": _bit,
    "a block zeroed": _block,
    "all zeroed": lambda data, rng: bytes(len(data)),
    "written twice": lambda data, rng: data + data,
    "something behind": lambda data, rng: data + rng.choice((b"\x00", b"abc\n", b"{}", b"\n\n", b"]")),
}
TEXT: dict[str, Break] = {
    "in UTF-16": lambda data, rng: data.decode().encode("utf-16"),
    "behind a BOM": lambda data, rng: b"\xef\xbb\xbf" + data,
    "a byte of Latin-1": lambda data, rng: data[: len(data) // 2] + b"\xe9" + data[len(data) // 2 :],
    "with CR LF": lambda data, rng: data.replace(b"\n", b"\r\n"),
    "a line lost": _lines(_without),
    "a line twice": _lines(_twice),
    "another file": lambda data, rng: rng.choice(
        (b"abc\n", b"{}\n", b"[]\n", b"null\n", b"5\n", b'"abc"\n', b"PK\x03\x04")
    ),
}


def _cells(separator: bytes, change: Callable[[list[list[bytes]], random.Random], None]) -> Break:
    def broken(data: bytes, rng: random.Random) -> bytes:
        rows = [line.split(separator) for line in data.splitlines()]
        change(rows, rng)
        return b"".join(separator.join(row) + b"\n" for row in rows)

    return broken


def _other_cell(rows: list[list[bytes]], rng: random.Random) -> None:
    row = rng.choice(rows)
    row[rng.randrange(len(row))] = rng.choice(CELLS).encode()


def _short_row(rows: list[list[bytes]], rng: random.Random) -> None:
    del rng.choice(rows)[-1]


def _long_row(rows: list[list[bytes]], rng: random.Random) -> None:
    rng.choice(rows).append(b"1")


def _lost_column(rows: list[list[bytes]], rng: random.Random) -> None:
    place = rng.randrange(len(rows[0]))
    for row in rows:
        del row[place]


TABLE = {"another cell": _other_cell, "a short row": _short_row, "a long row": _long_row, "a column lost": _lost_column}


def places(value: Any, path: Place = ()) -> Iterator[Place]:
    """The keys that lead to every value in what JSON holds."""
    yield path
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in pairs:
        yield from places(inner, (*path, key))


def _drawn(contents: Any, rng: random.Random) -> Place:
    """A place, with one at the top as likely as one deep inside."""
    found = list(places(contents))[1:]
    depth = rng.choice(sorted({min(len(place), 3) for place in found}))
    return rng.choice([place for place in found if min(len(place), 3) == depth])


def _inside(contents: Any, place: Place) -> Any:
    for key in place:
        contents = contents[key]
    return contents


def broken_json(contents: Any, rng: random.Random) -> tuple[str, Place, bool, str]:
    """JSON with one thing wrong.

    Returns:
        what was done, where, whether a number became another finite number, and the text.
    """
    kind = rng.choice(("lost", "other", "other", "other", "twice", "shape", "added"))
    place = _drawn(contents, rng)
    around, key, value = _inside(contents, place[:-1]), place[-1], _inside(contents, place)
    alike = False
    if kind == "lost":
        del around[key]
        what = "lost"
    elif kind == "twice" and isinstance(around, dict):
        around[f"{key}{AGAIN}"] = other = rng.choice(OTHERS[:8])
        what = f"twice, then {other!r}"
    elif kind == "shape" and isinstance(value, list) and value:
        what = rng.choice(("shorter", "longer", "reversed", "wrapped"))
        around[key] = {
            "shorter": value[:-1],
            "longer": [*value, value[-1]],
            "reversed": value[::-1],
            "wrapped": [value],
        }[what]
    elif kind == "added" and isinstance(value, dict):
        value["abc"] = 1
        what, place = "with abc=1", (*place, "abc")
    else:
        other = rng.choice(OTHERS)
        around[key] = other
        what = f"made {str(other)[:12]!a}"
        alike = isinstance(value, float) and isinstance(other, int | float) and other is not True and abs(other) < 1e300
    return what, place, alike, written(contents)


def written(contents: Any) -> str:
    """JSON text, with what `json` would not write."""
    text = json.dumps(contents).replace(json.dumps(AGAIN)[1:-1], "")
    return text.replace('"DEEP"', "[" * DEEP + "]" * DEEP).replace('"LONGER"', LONGER)


def _pipe(path: Path) -> None:
    os.mkfifo(path)


def _loop(path: Path) -> None:
    path.symlink_to(path.name)


STANDINS: dict[str, Callable[[Path], None]] = {
    "a folder": lambda path: path.mkdir(),
    "a pipe": _pipe,
    "a link to itself": _loop,
    "nothing": lambda path: None,
}


def break_file(path: Path, kind: str, rng: random.Random) -> tuple[str, Place | None, bool]:
    """Break a file in place.

    Args:
        path: the file.
        kind: json, jsonl, tsv, csv, text or bytes.
        rng: draws how.

    Returns:
        what was done; of JSON where; whether a number became another.
    """
    grammar = [
        *["contents"] * 5 * (kind not in ("bytes", "text")),
        "bytes",
        "bytes",
        *["text"] * (kind != "bytes"),
        "place",
    ]
    drawn = rng.choice(grammar)
    data = path.read_bytes()
    if drawn == "place":
        name = rng.choice(list(STANDINS))
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        STANDINS[name](path)
        return f"{name} in its place", None, False
    if drawn == "contents" and kind in ("tsv", "csv"):
        name = rng.choice(list(TABLE))
        path.write_bytes(_cells(b"\t" if kind == "tsv" else b",", TABLE[name])(data, rng))
        return name, None, False
    if drawn == "contents":
        lines = data.decode().splitlines() if kind == "jsonl" else [data.decode()]
        line = rng.randrange(len(lines))
        what, place, alike, lines[line] = broken_json(json.loads(lines[line]), rng)
        path.write_text("".join(f"{one}\n" for one in lines), encoding="utf-8")
        shown = ".".join(map(str, place))
        return f"line {line + 1}, {shown} {what}" if kind == "jsonl" else f"{shown} {what}", place, alike
    grammar = BYTES if drawn == "bytes" else TEXT
    name = rng.choice(list(grammar))
    path.write_bytes(grammar[name](data, rng))
    return name, None, False
