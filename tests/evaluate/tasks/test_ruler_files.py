import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from duo_id.common.errors import UserError
from duo_id.evaluate.tasks import ruler_files
from duo_id.evaluate.tasks.ruler_files import Sample, read_ruler

Write = Callable[..., None]
ROW = {"index": 3, "input": "VAR AB = 5\nWhich variables are 5?", "outputs": ["AB", "CD"], "length": 80}
HUB_ROW = {"task": "vt", "context": "VAR AB = 5\n", "question": "Which variables are 5?", "answer": ["AB", "CD"]}
GOOD = json.dumps(ROW).encode() + b"\n"


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes rows to a file below tmp_path, in the format of its suffix."""

    def write(name: str, *rows: dict[str, Any]) -> None:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".parquet":
            pd.DataFrame(rows).to_parquet(path)
        else:
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))

    return write


def read(folder: Path, length: int = 4096) -> list[Sample]:
    return read_ruler("vt", str(folder), length)


@pytest.mark.parametrize("name", ["4096/test-00000-of-00001.parquet", "ruler/4096/all.jsonl"])
@pytest.mark.parametrize("inside", [False, True])
def test_rows_of_the_hub_are_those_of_their_task(tmp_path: Path, write: Write, name: str, inside: bool) -> None:
    """One file for all tasks, and the user gives the folder of all lengths or of one."""
    named = HUB_ROW | {"answer_prefix": "They are", "max_new_tokens": 9}
    write(name, named, named | {"task": "qa_1", "max_new_tokens": 32})
    expected = Sample("VAR AB = 5\n", "Which variables are 5?", "They are", ("AB", "CD"), 9)
    assert read((tmp_path / name).parent if inside else tmp_path) == [expected]


def test_the_question_of_a_script_is_its_last_line(tmp_path: Path, write: Write) -> None:
    for length in (4096, 8192):
        write(f"some-model/synthetic/{length}/data/vt/validation.jsonl", ROW | {"length": length})
    expected = Sample("VAR AB = 5", "\nWhich variables are 5?", "", ("AB", "CD"), None)
    assert read(tmp_path) == read(tmp_path, 8192) == [expected]


def test_context_and_question_are_apart(tmp_path: Path, write: Write) -> None:
    write("4096.jsonl", HUB_ROW | {"context": "VAR AB = 5"})
    assert read(tmp_path)[0].question == "\nWhich variables are 5?"


def test_parts_of_a_task_are_read_in_order(tmp_path: Path, write: Write) -> None:
    for part in "ab":
        write(f"4096/vt/{part}.jsonl", ROW | {"outputs": part})
    assert [sample.references for sample in read(tmp_path)] == [("a",), ("b",)]


def test_blank_answers_are_left_out(tmp_path: Path, write: Write) -> None:
    write("4096/vt/validation.jsonl", ROW | {"outputs": ["", " ", 17]})
    assert read(tmp_path)[0].references == ("17",)


def test_missing_data_is_named_with_what_to_do(tmp_path: Path, write: Write) -> None:
    write("4096/vt/validation.jsonl", ROW)
    with pytest.raises(UserError, match=r"ruler-data/vt: no data of lengths=8192 in data\.path=.*benchmarks\.md"):
        read(tmp_path, 8192)
    with pytest.raises(UserError, match=r"data\.path=.*: no such folder"):
        read(tmp_path / "nowhere")


@pytest.mark.parametrize("other", ["4096/vt/validation.parquet", "more/4096/vt/validation.jsonl"])
def test_the_same_data_twice_is_refused(tmp_path: Path, write: Write, other: str) -> None:
    write("4096/vt/validation.jsonl", ROW)
    write(other, ROW)
    with pytest.raises(UserError, match=r"data\.path=.* has vt twice"):
        read(tmp_path)


def test_without_the_hub_the_error_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise ConnectionError("no network")

    monkeypatch.setattr(ruler_files.datasets, "load_dataset", refuse)
    with pytest.raises(UserError, match=r"huggingface.co/datasets/.* cannot be loaded: no network\. .*data\.path="):
        read_ruler("vt", None, 4096)


def test_what_is_asked_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    requests: list[object] = []

    def load(repository: str, data_dir: str, split: str) -> list[dict[str, Any]]:
        requests.append((repository, data_dir, split))
        return [HUB_ROW | {"task": "qa_1"}, HUB_ROW | {"answer": "AB"}]

    monkeypatch.setattr(ruler_files.datasets, "load_dataset", load)
    assert [sample.references for sample in read_ruler("vt", None, 4096)] == [("AB",)]
    assert requests == [("simonjegou/ruler", "4096", "test")]


@pytest.mark.parametrize(
    ("contents", "words"),
    [
        (b"", "has no rows"),
        (b"\n\n", "has no rows"),
        (GOOD + GOOD[:-10], r"vt\.jsonl, line 2, column \d+: not JSON"),
        (GOOD + b"\n[1]\n", r"vt\.jsonl, line 3: expected a JSON object, found list"),
        (GOOD + GOOD.replace(b'"input": "', b'"input": null, "x": "'), r"vt\.jsonl, line 2: input=None is no text"),
        (GOOD.replace(b'"outputs"', b'"text"'), r"vt\.jsonl, line 1 lacks outputs"),
        (GOOD.replace(b"\\n", b" "), r"vt\.jsonl, line 1: its input is a single line"),
        (GOOD.replace(b'["AB", "CD"]', b"5"), r"vt\.jsonl, line 1: outputs\S* is no text"),
        (GOOD.decode().encode("utf-16"), r"vt\.jsonl is not a text file in UTF-8"),
        (b"PK\x03\x04\xff", r"vt\.jsonl is not a text file in UTF-8"),
        (GOOD.replace(b'"length": 80', b'"length": NaN'), r"vt\.jsonl: nan is no finite number"),
        (GOOD.replace(b'"length": 80', b'"length": ' + b"[" * 10**5), r"vt\.jsonl, line 1, column \d+: not JSON"),
    ],
    ids="empty blank cut-off list null column one-line number utf-16 archive nan deep".split(),
)
def test_damaged_lines_are_named(tmp_path: Path, contents: bytes, words: str) -> None:
    (tmp_path / "4096").mkdir()
    (tmp_path / "4096" / "vt.jsonl").write_bytes(contents)
    with pytest.raises(UserError, match=words) as error:
        read(tmp_path)
    assert str(error.value).isprintable()


def test_a_damaged_parquet_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "4096.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match=r"4096\.parquet cannot be read"):
        read(tmp_path)
