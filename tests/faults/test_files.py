"""Broken files are refused in one line that names them, or read as what they were."""

import json
import random
from pathlib import Path

import pytest

from tests.faults.broken_files import EVERY, FORMATS, Format, file_trials, tried
from tests.faults.mutations import BYTES, STANDINS, TEXT, break_file, broken_json
from tests.faults.worker import Worker

QUICK = ("heads", "foreign", "ruler", "haystack", "weights")  # readers
SHORT = [form for form in FORMATS if form.reader in QUICK and form.file.partition("/")[0] != "RUN"]
KNOWN: dict[Format, str] = {}


@pytest.mark.parametrize("form", SHORT, ids=lambda form: form.file)
def test_a_broken_file_is_refused_or_harmless(form: Format, place: Worker, made: Path, tmp_path: Path) -> None:
    what, outcome, detail = tried(form, random.Random(f"0:{form.file}"), place, made, tmp_path, KNOWN)
    assert outcome in ("refused", "equal", "ran"), f"{form.file}, {what}: {detail}"


@pytest.mark.slow
def test_three_hundred_broken_files() -> None:
    failures = [trial for trial in file_trials(0, 300) if trial[2] not in ("refused", "equal", "ran")]
    assert not failures, "\n".join("\n  ".join(trial) for trial in failures)


@pytest.mark.parametrize("kind", ["json", "jsonl", "tsv", "csv", "text", "bytes"])
def test_a_file_is_broken_in_every_way(kind: str, tmp_path: Path) -> None:
    whole = {
        "json": '{"a": {"b": [1.25, 2]}, "c": "d"}\n',
        "jsonl": '{"a": {"b": [1.25, 2]}, "c": "d"}\n' * 3,
        "tsv": "1\t2\n3\t4\n",
        "csv": "a,b\n1,2\n3,4\n",
    }.get(kind, "some text\nof lines\n")
    seen = set()
    for number in range(400):
        folder = tmp_path / str(number)
        folder.mkdir()
        path = folder / "file"
        path.write_text(whole)
        what, _, _ = break_file(path, kind, random.Random(number))
        assert not path.is_file() or path.read_bytes() != whole.encode() or what in ("something behind", "another cell")
        seen.add(what)
    expected = {*BYTES, *(f"{name} in its place" for name in STANDINS), *(TEXT if kind != "bytes" else ())}
    assert expected <= seen


def test_json_is_broken_in_one_place() -> None:
    whole = {"a": {"b": [1.5, 2.5]}, "c": 3, "d": []}
    texts = set()
    for number in range(500):
        _, place, alike, text = broken_json(json.loads(json.dumps(whole)), random.Random(number))
        texts.add(text)
        assert place
        if alike:
            (other,) = [one for one in json.loads(text)["a"]["b"] if one not in (1.5, 2.5)] or [1.5]
            assert isinstance(other, int | float)
    assert any(text.count('"c":') == 2 for text in texts)
    assert any("[" * 1000 in text for text in texts)
    assert any("\\ud800" in text for text in texts)


def test_every_file_is_free_somewhere_or_nowhere() -> None:
    assert all(form.free == EVERY or "" not in form.free for form in FORMATS)
    assert len({(form.file, form.reader) for form in FORMATS}) == len(FORMATS)
