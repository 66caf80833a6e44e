"""JSON and text of others: sizes, depth, numbers, characters, and schemas whose errors are one line."""

import json
import os
import re
from pathlib import Path
from typing import Annotated, Any

import pytest

from duo_id.common import documents
from duo_id.common.documents import (
    FIRST,
    Data,
    Line,
    Natural,
    Share,
    checked,
    parse_json,
    parse_lines,
    read_json,
    read_object,
    read_text,
)
from duo_id.common.errors import UserError
from duo_id.patterns.saved import load_pattern
from duo_id.patterns.sources import SHIPPED


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "F, line 1, column N: not JSON"),
        ('{"a": }', "F, line 1, column N: not JSON"),
        ("[1,\n x]", "F, line 2, column N: not JSON"),
        ("[1] 2", "F, line 1, column N: not JSON"),
        ("[" * 10**6, "F, line 1, column N: not JSON"),
        ("[NaN]", "F: nan is no finite number"),
        ('{"a": [-Infinity]}', "F: -inf is no finite number"),
        ("[1e400]", "F: inf is no finite number"),
        (f"[{2**63}]", "F: 9223372036854775808 is beyond 64 bits"),
        (f"[{'9' * 5000}]", "F, line 1, column N: not JSON"),
        (r'["\ud800"]', "F, line 1, column N: not JSON"),
        ('["\x01"]', "F, line 1, column N: not JSON"),
    ],
)
def test_what_is_no_data_is_named(text: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        parse_json(text, "F")
    assert re.sub(r"column \d+: not JSON \(.+\)$", "column N: not JSON", str(error.value)) == message


def test_data_comes_through() -> None:
    data = {"a": [1, -(2**63), 2**63 - 1, 1.5, 1e-300, None, True, "α \N{GRINNING FACE} \\ud800"], "b": {"c": []}}
    assert parse_json(json.dumps(data), "F") == data
    assert parse_json(json.dumps(data, ensure_ascii=False), "F") == data


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (r'"a \ud800"', "a ?"),
        (r'"\udc00\ud83d\ude00\ud83d"', "?\N{GRINNING FACE}?"),
        (r'"\\ud800 \\\ud800"', r"\ud800 \?"),
        (r'"\uD800x\u0041"', "?xA"),
    ],
)
def test_half_characters_are_mended_where_that_is_asked_for(text: str, expected: str) -> None:
    assert parse_json(text, "F", replace_surrogates=True) == expected
    with pytest.raises(UserError, match="not JSON"):
        parse_json(text, "F")


def test_lines_have_their_numbers() -> None:
    assert parse_lines(['{"a": 1}', "", " ", '{"b": 2}', ""], "F") == [(1, {"a": 1}), (4, {"b": 2})]
    with pytest.raises(UserError, match=r"^F, line 3, column 2: not JSON"):
        parse_lines(["{}", "", " x"], "F")
    with pytest.raises(UserError, match=r"^F, line 2: expected a JSON object, found list"):
        parse_lines(["{}", "[]"], "F")


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        (b"\xff\xfe", "is not a text file in UTF-8"),
        ("[1]".encode("utf-16"), "is not a text file in UTF-8"),
        (b"[" + b" " * documents.LARGEST, "has 16,777,217 bytes, more than the limit of 16,777,216 for such a file"),
    ],
    ids=["binary", "utf-16", "huge"],
)
def test_files_that_are_no_text_or_too_large_are_named(contents: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_bytes(contents)
    with pytest.raises(UserError) as error:
        read_json(tmp_path / "x.json")
    assert str(error.value) == f"{tmp_path / 'x.json'} {message}"


def test_a_gigabyte_is_refused_without_reading_it(tmp_path: Path) -> None:
    path = tmp_path / "heads.json"
    path.touch()
    os.truncate(path, 2**30)
    with pytest.raises(UserError, match=r"heads\.json has 1,073,741,824 bytes, more than"):
        load_pattern(path)


def test_what_is_no_file_is_named(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")  # which would wait for somebody to write
    (tmp_path / "folder").mkdir()
    for name, message in (("pipe", "is no file"), ("folder", "is a folder"), ("none", "cannot be read")):
        with pytest.raises(UserError, match=message):
            read_text(tmp_path / name)


def test_a_byte_order_mark_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_bytes(b'\xef\xbb\xbf{"a": 1}')
    assert read_object(tmp_path / "x.json") == {"a": 1}
    (tmp_path / "full_attention_heads.tsv").write_bytes(b"\xef\xbb\xbf0.5\t1\r\n0\t0.25\r\n")
    (tmp_path / "config.json").write_text('{"sink_size": 1, "recent_size": 2}')
    assert load_pattern(tmp_path).scores.tolist() == [[0.5, 1.0], [0.0, 0.25]]


class Inner(Data):
    """Of the tests."""

    name: Line
    share: Share = 0.5


class Outer(Data):
    """Of the tests."""

    inner: Inner
    many: Annotated[list[Natural], FIRST] | None = None


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        ([], "F: is no object"),
        ({}, "F lacks inner"),
        ({"inner": None}, "F: inner=None is no object"),
        ({"inner": {}}, "F: inner lacks name"),
        ({"inner": {"name": 3}}, "F: inner.name=3 is no text"),
        ({"inner": {"name": "x", "share": True}}, "F: inner.share=True is no number"),
        ({"inner": {"name": "x", "share": 2}}, "F: inner.share=2 must be less than or equal to 1"),
        ({"inner": {"name": "x"}, "many": {"a": 1}}, "F: many={...} is no list"),
        ({"inner": {"name": "x"}, "many": [1, 1.5, "x"]}, "F: many.1=1.5 is no whole number"),
        ({"inner": {"name": "x"}, "many": [-1]}, "F: many.0=-1 must be greater than or equal to 0"),
    ],
)
def test_what_a_schema_does_not_allow_is_one_line(contents: Any, message: str) -> None:
    with pytest.raises(UserError) as error:
        checked(Outer, contents, "F")
    assert str(error.value) == message


def test_hostile_keys_and_values_stay_on_one_short_line() -> None:
    class Named(Data):
        """Of this test."""

        weights: dict[str, Natural]

    with pytest.raises(UserError) as error:
        checked(Named, {"weights": {"a\n\x1b" * 10**5: "b\n\x1b" * 10**5}}, "F")
    assert str(error.value).isprintable()
    assert len(str(error.value)) < 400


@pytest.mark.parametrize("name", ["heads.json", "summary.json"])
def test_limits_are_far_beyond_what_ships(name: str) -> None:
    assert 100 * (SHIPPED / "SmolLM2-135M-Instruct" / name).stat().st_size < documents.LARGEST
