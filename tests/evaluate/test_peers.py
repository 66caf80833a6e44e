"""Samples for the peers, and their answers."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from duo_id.common.errors import UserError
from duo_id.common.integrity import unsealed
from duo_id.evaluate.items import Item, Question, from_json
from duo_id.evaluate.peers import HEADER, read_answers, write_samples

TOLD = dict.fromkeys(HEADER, 1) | {"sparsities": [0.25, 0.5], "shares": [0.2, 0.5]}
ITEMS = [
    Item(
        task="passkey",
        length=64,
        index=index,
        context=(1, 5, 6, 7 + index),
        questions=(
            Question(prompt=(8,), answer=(9, 10), references=("né",)),
            Question(prompt=(), answer=(6,), place=2),
        ),
        max_new_tokens=4,
    )
    for index in range(2)
]


def answer(index: int = 0, sparsity: float = 0.5, loss: float = 1.5) -> dict[str, Any]:
    """A line of a press's file."""
    measured = {"kl": 0.25, "correct": 1, "full_loss": 1.0, "bytes": 300, "full_bytes": 400}
    questions = [
        {"question": 0, "loss": loss, "tokens": 2, "generated": [9, 11]} | measured,
        {"question": 1, "loss": 0.5, "tokens": 1, "generated": None} | measured,
    ]
    return {"task": "passkey", "length": 64, "index": index, "sparsity": sparsity, "questions": questions}


def write_answers(folder: Path, lines: list[dict[str, Any]], end: str = "", **changes: Any) -> Path:
    digest = hashlib.sha256((folder / "samples.jsonl").read_bytes()).hexdigest()
    header = {"schema": "duo_id/answers", "version": 1, "samples": digest, "press": "snapkv", "note": "window 64"}
    path = folder / "answers-snapkv.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in [header | changes, *lines]) + end)
    return path


@pytest.fixture
def run(tmp_path: Path) -> Path:
    write_samples(tmp_path / "samples.jsonl", TOLD, ITEMS)
    return tmp_path


def test_samples_read_back(run: Path) -> None:
    header, *items = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    assert unsealed(header) == {"schema": "duo_id/samples", "version": 1} | TOLD
    assert [from_json(item) for item in items] == ITEMS
    first = (run / "samples.jsonl").read_bytes()
    write_samples(run / "samples.jsonl", TOLD, ITEMS)
    assert (run / "samples.jsonl").read_bytes() == first


def test_samples_that_are_no_text_are_other_samples(run: Path) -> None:
    write_answers(run, [answer()])
    (run / "samples.jsonl").write_bytes((run / "samples.jsonl").read_bytes() + b"\xe9\n")
    with pytest.raises(UserError, match=r"answers other samples than the samples\.jsonl"):
        read_answers(run, ITEMS)


def test_answers_become_rows(run: Path) -> None:
    path = write_answers(run, [answer(), answer(index=1, sparsity=0.25)])
    rows = read_answers(run, ITEMS)
    assert len(rows) == 4
    assert rows[0] == {
        "task": "passkey",
        "length": 64,
        "index": 0,
        "question": 0,
        "kind": "eviction",
        "heads": "snapkv",
        "sparsity": 0.5,
        "cache": None,
        "seed": None,
        "loss": 1.5,
        "kl": 0.25,
        "tokens": 2,
        "correct": 1,
        "generated": [9, 11],
        "bytes": 300,
        "full_bytes": 400,
        "note": "window 64",
    }
    assert (rows[1]["generated"], rows[1]["note"]) == (None, "window 64; entries are evicted where the answer begins")
    assert [(row["index"], row["sparsity"]) for row in rows[2:]] == [(1, 0.25)] * 2
    assert read_answers(path, ITEMS) == rows


def test_no_answers_are_no_rows(run: Path) -> None:
    assert read_answers(run, ITEMS) == []


def test_a_later_line_replaces_and_a_torn_one_is_left_out(run: Path) -> None:
    write_answers(run, [answer(), answer(loss=7.0)], end=json.dumps(answer(index=1))[:-1])
    assert [(row["index"], row["loss"]) for row in read_answers(run, ITEMS)] == [(0, 7.0), (0, 0.5)]


def test_failures_are_told_in_the_note(run: Path) -> None:
    failed = answer(index=1) | {"error": "OutOfMemoryError"}
    del failed["questions"]
    write_answers(run, [answer(), failed])
    rows = read_answers(run, ITEMS)
    assert [row["index"] for row in rows] == [0, 0]
    assert rows[0]["note"] == "window 64; failed on 1 contexts, first with OutOfMemoryError"
    write_answers(run, [failed, answer(index=1)])
    assert not any("failed" in row["note"] for row in read_answers(run, ITEMS))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"schema": "duo_id/results"}, "holds 'duo_id/results', not"),
        ({"version": 2}, "has version 2"),
        ({"samples": "0" * 64}, "answers other samples"),
    ],
)
def test_other_files_are_refused(run: Path, changes: dict[str, Any], words: str) -> None:
    write_answers(run, [answer()], **changes)
    with pytest.raises(UserError, match=words) as error:
        read_answers(run, ITEMS)
    assert f"duo-id peers {run}" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"loss": None}, "questions.0.loss=None is no number"),
        ({"question": 9}, "question 9 of passkey differs from the one"),
        ({"generated": "drop"}, r"questions\.0 lacks generated"),
    ],
)
def test_damaged_answers_are_named(run: Path, change: dict[str, Any], words: str) -> None:
    question = answer()["questions"][0] | change
    question = {key: value for key, value in question.items() if value != "drop"}
    write_answers(run, [answer() | {"questions": [question]}])
    with pytest.raises(UserError, match=words):
        read_answers(run, ITEMS)


@pytest.mark.parametrize("key", ["task", "sparsity", "questions"])
def test_lines_lack_nothing(run: Path, key: str) -> None:
    write_answers(run, [{name: value for name, value in answer().items() if name != key}])
    with pytest.raises(UserError, match=f"lacks {key}"):
        read_answers(run, ITEMS)


def test_other_samples_are_refused(run: Path) -> None:
    write_answers(run, [answer()])
    with pytest.raises(UserError, match="sample 0 of passkey at 64 tokens is not part of this evaluation"):
        read_answers(run, ITEMS[1:])
    changed = Item(**{**vars(ITEMS[0]), "context": (1, 5, 6, 8)})
    with pytest.raises(UserError, match="changed since"):
        read_answers(run, [changed])
    write_answers(run, [answer() | {"questions": [answer()["questions"][0] | {"tokens": 3}]}])
    with pytest.raises(UserError, match="question 0 of passkey differs from the one"):
        read_answers(run, ITEMS)


def test_what_cannot_be_read_is_refused(run: Path) -> None:
    (run / "answers-tova.jsonl").write_text("# no JSON\n")
    with pytest.raises(UserError, match="holds no answers from peers"):
        read_answers(run, ITEMS)
    write_answers(run, [answer()])
    with pytest.raises(UserError, match="cannot be read"):
        read_answers(run / "answers-knorm.jsonl", ITEMS)
    (run / "samples.jsonl").unlink()
    with pytest.raises(UserError, match=r"samples\.jsonl cannot be read"):
        read_answers(run, ITEMS)


def test_answers_at_a_share_of_the_cache_have_no_sparsity(run: Path) -> None:
    at_share = answer() | {"sparsity": None, "cache": 0.25}
    write_answers(run, [answer(), at_share, at_share])
    rows = read_answers(run, ITEMS)
    assert [(row["sparsity"], row["cache"]) for row in rows] == [(0.5, None)] * 2 + [(None, 0.25)] * 2
