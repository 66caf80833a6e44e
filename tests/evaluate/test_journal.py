"""Scores persist: through a kill in mid-line and on resuming, but never under another version or other settings."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from duo_id.common.errors import UserError
from duo_id.common.integrity import unsealed
from duo_id.evaluate.items import Item, Question
from duo_id.evaluate.journal import JOURNAL, RESULTS, Journal, write_results
from duo_id.report.rows import ASKED

ITEM = Item("t", 100, 0, (1,) * 9, (Question((1,), (2,)), Question((), (1,), place=3)), max_new_tokens=5)
KEY = ("baseline", "random", 0.25, 3, None)


def row(question: int, text: str | None = None, **changes: Any) -> dict[str, Any]:
    contender = dict(zip(ASKED, KEY, strict=True))
    row = {"task": "t", "length": 100, "index": 0, "sample": ITEM.digest, "question": question}
    measured = {"depth": None, "kl": 0.5, "tokens": 2, "correct": 1, "score": None, "exact": None, "bytes": 9}
    return row | contender | {"text": text, "loss": 1.5} | measured | changes


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("[1]", "line 3: expected a JSON object, found list"),
        ('{"task": "t"}', "line 3 lacks length, index"),
        (json.dumps(dict(row(0), loss="x")), "line 3: loss='x' is no number"),
    ],
)
def test_a_damaged_row_is_named(line: str, named: str, tmp_path: Path) -> None:
    Journal(tmp_path, {}).add([row(0)])
    with open(tmp_path / JOURNAL, "a") as file:
        file.write(line + "\n")
    with pytest.raises(UserError, match=named):
        Journal(tmp_path, {})


@pytest.mark.parametrize("contents", [b"3\n", b"[]\n", b"\xff\xfe\n", b""])
def test_a_file_without_a_header_is_refused(contents: bytes, tmp_path: Path) -> None:
    (tmp_path / JOURNAL).write_bytes(contents)
    with pytest.raises(UserError, match="leave out resume"):
        Journal(tmp_path, {})


def test_rows_are_there_after_the_process_has_gone(tmp_path: Path) -> None:
    journal = Journal(tmp_path, {"seed": 0, "model": {"name": "m"}})
    assert not journal.has(ITEM, KEY, False)
    journal.add([row(0)])
    assert not journal.has(ITEM, KEY, False), "one question is missing"
    journal.add([row(1)])
    reopened = Journal(tmp_path, {"seed": 0, "model": {"name": "m"}})
    assert reopened.rows == journal.rows == [row(0), row(1)]
    assert reopened.has(ITEM, KEY, False)
    assert not reopened.has(ITEM, KEY, True), "nothing was generated"
    assert not reopened.has(ITEM, ("baseline", "random", 0.25, 4), False)


def test_a_generated_answer_takes_the_place_of_a_row_without(tmp_path: Path) -> None:
    journal = Journal(tmp_path, {})
    journal.add([row(0), row(1)])
    journal.add([row(0, "an answer"), row(1)])
    for opened in (journal, Journal(tmp_path, {})):
        assert opened.rows == [row(0, "an answer"), row(1)]
        assert opened.has(ITEM, KEY, True)


def test_a_sample_that_was_another_one_is_refused(tmp_path: Path) -> None:
    Journal(tmp_path, {}).add([row(0), row(1)])
    changed = replace(ITEM, context=(1,) * 8 + (2,))
    with pytest.raises(UserError, match=r"sample 0 of t at 100 tokens in .* differs"):
        Journal(tmp_path, {}).has(changed, KEY, False)


@pytest.mark.parametrize("torn", ['{"task": "t", "le', '{"task": "t"}'])
def test_a_torn_line_is_dropped(torn: str, tmp_path: Path) -> None:
    journal = Journal(tmp_path, {"seed": 0})
    journal.add([row(0)])
    with open(tmp_path / JOURNAL, "a") as file:
        file.write(torn)
    reopened = Journal(tmp_path, {"seed": 0})
    reopened.add([row(1)])
    assert Journal(tmp_path, {"seed": 0}).rows == [row(0), row(1)]


def test_other_settings_and_versions_are_refused(tmp_path: Path) -> None:
    Journal(tmp_path, {"seed": 0}).add([row(0)])
    with pytest.raises(UserError, match="another seed"):
        Journal(tmp_path, {"seed": 1})
    with pytest.raises(UserError, match="another split"):
        Journal(tmp_path, {"seed": 0, "split": "test"})
    path = tmp_path / JOURNAL
    text = path.read_text()
    header = unsealed(json.loads(text.partition("\n")[0])) | {"version": 99}
    path.write_text(json.dumps(header) + "\n")
    with pytest.raises(UserError, match="version 99"):
        Journal(tmp_path, {"seed": 0})
    path.write_text(text + "no json\n")
    with pytest.raises(UserError, match="cannot be read"):
        Journal(tmp_path, {"seed": 0})
    path.write_text("")
    with pytest.raises(UserError, match="cannot be read"):
        Journal(tmp_path, {"seed": 0})


def test_results_are_json_and_parquet(tmp_path: Path) -> None:
    rows = [row(0, 'with "quotes"\nand lines'), row(1)]
    write_results(tmp_path, {"seed": 0, "rows": rows})
    saved = unsealed(json.loads((tmp_path / RESULTS).read_text()))
    assert saved == {"schema": "duo_id/results", "version": 1, "seed": 0, "rows": rows}
    table = pd.read_parquet(tmp_path / "results.parquet")
    assert table["question"].tolist() == [0, 1]
    assert table["text"].tolist()[0] == rows[0]["text"]
    write_results(tmp_path, {"rows": []})
    assert json.loads((tmp_path / RESULTS).read_text())["rows"] == []
