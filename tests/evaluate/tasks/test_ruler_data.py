import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from duo_id.common.errors import UserError
from duo_id.data.chat import Chat, plain
from duo_id.data.haystack import tokenize
from duo_id.evaluate.items import Item
from duo_id.evaluate.tasks.names import expand_ruler, is_ruler_data
from duo_id.evaluate.tasks.ruler_data import ruler_items
from duo_id.models.loading import byte_tokenizer

TOKENIZER = byte_tokenizer()  # a token is a byte of text
CHAT = Chat(tuple(tokenize(TOKENIZER, "<user>")), tuple(tokenize(TOKENIZER, "<model>")))
ROW = {"input": "Remember.\nVAR AB = 5\nVAR CD = VAR AB\nQuestion: Which variables have the value 5?"}
ROW["outputs"] = ["AB", "CD"]
NEEDLE = {"context": "Words.\nThe magic number for oak is 17.\n", "question": "What is the magic number for oak?"}
NEEDLE |= {"answer_prefix": "The magic number for oak is", "answer": ["17"]}


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def write(*rows: dict[str, Any], length: int = 4096) -> None:
    Path(f"{length}.jsonl").write_text("".join(json.dumps({"task": "vt"} | row) + "\n" for row in rows))


def items(
    *names: str, chat: Chat | None = None, limit: int | None = None, lengths: Sequence[int] = (4096,), samples: int = 5
) -> list[Item]:
    return ruler_items(names, ".", TOKENIZER, chat or plain(TOKENIZER), limit, lengths, samples)


def text(tokens: Sequence[int]) -> str:
    return TOKENIZER.decode(list(tokens), skip_special_tokens=False)


def whole(item: Item) -> str:
    return text((*item.context, *item.questions[0].prompt, *item.questions[0].answer))


def test_names_are_those_of_the_benchmark() -> None:
    assert is_ruler_data("ruler-data")
    assert is_ruler_data("ruler-data/vt")
    assert not is_ruler_data("ruler-multivalue")
    assert len(expand_ruler(["ruler-data"])) == 13
    assert expand_ruler(["ruler-data/vt", "ruler-data"])[:2] == ["vt", "niah_single_1"]
    assert len(expand_ruler(["ruler-data/vt", "ruler-data"])) == 13


@pytest.mark.parametrize("name", ["ruler-data/s", "ruler-data/", "ruler-data/vt/"])
def test_an_unknown_task_lists_the_known(name: str) -> None:
    with pytest.raises(UserError, match=f"tasks={name}: no such data set.*ruler-data/vt"):
        items(name)


def test_an_item_holds_context_question_and_answer() -> None:
    write({"task": "niah_single_1", "max_new_tokens": 9} | NEEDLE, {"task": "qa_1"} | NEEDLE)
    needle, answer = items("ruler-data/niah_single_1", "ruler-data/qa_1")
    assert text(needle.context) == f"<bos>{NEEDLE['context']}"
    assert whole(needle).endswith("What is the magic number for oak? The magic number for oak is 17")
    assert text(needle.questions[0].answer) == " 17"
    assert needle.questions[0].references == ("17",)
    assert (needle.questions[0].depth, needle.questions[0].place) == (None, None)
    assert (needle.task, needle.length, needle.index) == ("ruler-data/niah_single_1", 4096, 0)
    assert (needle.metric, needle.max_new_tokens, needle.stop) == ("all", 9, None)
    assert (answer.metric, answer.max_new_tokens) == ("any", 32)


@pytest.mark.parametrize("prefix", [False, True])
def test_what_begins_the_answer_stands_behind_the_chat_template(prefix: bool) -> None:
    cue = " The variables are: "
    row = ROW | {"answer_prefix": cue} if prefix else ROW | {"input": ROW["input"] + cue}
    for length in (4096, 8192):
        write(row, length=length)
    four, eight = items("ruler-data/vt", lengths=(4096, 8192))
    assert (four.length, eight.length) == (4096, 8192)
    assert text(four.context) == "<bos>Remember.\nVAR AB = 5\nVAR CD = VAR AB"
    assert whole(four).endswith("\nQuestion: Which variables have the value 5? The variables are: AB")
    assert text(four.questions[0].answer) == "AB"
    assert (four.metric, four.max_new_tokens) == ("all", 30)
    (item,) = items("ruler-data/vt", chat=CHAT)
    ending = "?<model>The variables are: " if prefix else "? The variables are: <model>"
    assert whole(item).startswith("<user>Remember.")
    assert text(item.questions[0].prompt).endswith(ending)


def test_samples_are_the_first_rows() -> None:
    write(*(ROW | {"outputs": [word]} for word in ("one", "two", "three")))
    first = items("ruler-data/vt", samples=2)
    assert [(item.index, item.questions[0].references) for item in first] == [(0, ("one",)), (1, ("two",))]


def test_what_the_model_cannot_take_is_refused() -> None:
    write(ROW)
    with pytest.raises(UserError, match="lengths=4096 exceeds the 2048 tokens"):
        items("ruler-data/vt", limit=2048)
    write(ROW, ROW | {"input": "VAR " * 1024 + ROW["input"]})
    assert len(items("ruler-data/vt", limit=4096, samples=1)) == 1
    with pytest.raises(UserError, match=r"ruler-data/vt, lengths=4096, sample 1 takes 42\d\d tokens .* the 4096 "):
        items("ruler-data/vt", limit=4096)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (ROW | {"outputs": [" "]}, "sample 0: the data has no answer"),
        (NEEDLE | {"context": ""}, "sample 0: the data has no context or no question"),
        (NEEDLE | {"question": "", "context": "A.\n", "answer_prefix": ""}, "the data has no context or no question"),
    ],
)
def test_what_cannot_be_asked_is_refused(row: dict[str, Any], words: str) -> None:
    write(row)
    with pytest.raises(UserError, match=words):
        items("ruler-data/vt", chat=Chat((), ()))
