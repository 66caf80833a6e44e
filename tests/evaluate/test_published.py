import json
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from duo_id.common.errors import UserError
from duo_id.data.haystack import tokenize
from duo_id.evaluate.chat import Chat, plain
from duo_id.evaluate.items import Item
from duo_id.evaluate.metrics import METRICS, judge
from duo_id.evaluate.published import sources
from duo_id.evaluate.published.building import cut_middle
from duo_id.evaluate.published.longbench import DATA_SETS
from duo_id.evaluate.published.registry import is_published, published_items, published_names
from duo_id.models.loading import byte_tokenizer

TOKENIZER = byte_tokenizer()  # a token is a byte of text
STORY = "Ada built a mill. " * 20
Write = Callable[..., None]


def row(**changes: Any) -> dict[str, Any]:
    """A row as LongBench's files have them."""
    shared = {
        "input": "Who built it?",
        "context": STORY,
        "answers": ["Ada", "Ada L."],
        "length": 80,
        "all_classes": None,
    }
    return {**shared, "dataset": "qasper", "language": "en", "_id": "1", **changes}


GOOD = json.dumps(row()).encode() + b"\n"


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes rows to a file below tmp_path, in the format of its suffix."""

    def write(name: str, *rows: dict[str, Any]) -> None:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".parquet":
            pd.DataFrame(rows).to_parquet(path)
        elif path.suffix == ".json":
            path.write_text(json.dumps(list(rows)))
        else:
            path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")

    return write


def items(
    folder: Path | None,
    *names: str,
    chat: Chat | None = None,
    limit: int | None = None,
    lengths: Sequence[int] = (2000,),
    samples: int = 5,
) -> list[Item]:
    path = None if folder is None else str(folder)
    return published_items(names, path, TOKENIZER, chat or plain(TOKENIZER), limit, lengths, samples)


def text(tokens: Sequence[int]) -> str:
    return TOKENIZER.decode(list(tokens), skip_special_tokens=False)


def whole(item: Item, question: int = 0) -> str:
    return text((*item.context, *item.questions[question].prompt, *item.questions[question].answer))


def test_names_are_known_by_their_benchmark() -> None:
    assert is_published("longbench")
    assert is_published("ruler-data/vt")
    assert is_published("longbench-v2")
    assert not is_published("ruler-multivalue")
    assert len(published_names(["longbench"])) == 21
    assert len(published_names(["ruler-data"])) == 13
    assert published_names(["longbench/lcc", "longbench"])[:2] == ["longbench/lcc", "longbench/narrativeqa"]
    assert len(published_names(["longbench/lcc", "longbench"])) == 21


@pytest.mark.parametrize(
    ("name", "listed"), [("longbench/qasperr", "longbench/qasper,"), ("ruler-data/s", "ruler-data/vt")]
)
def test_an_unknown_data_set_lists_the_known(name: str, listed: str) -> None:
    with pytest.raises(UserError, match=f"tasks={name}: no such data set.*{listed}"):
        items(None, name)


def test_a_context_is_read_before_its_question(tmp_path: Path, write: Write) -> None:
    write("data/qasper.jsonl", row())
    (item,) = items(tmp_path, "longbench/qasper")
    context, (question,) = text(item.context), item.questions
    assert context.startswith("<bos>")
    assert context.endswith(STORY)
    assert "Who built it?" not in context
    assert "Who built it?" in text(question.prompt)
    assert whole(item).endswith("Answer: Ada")
    assert text(question.answer) == " Ada"
    assert question.references == ("Ada", "Ada L.")
    assert (question.depth, question.place) == (None, None)
    assert (item.task, item.length, item.index) == ("longbench/qasper", 2000, 0)
    assert (item.metric, item.max_new_tokens, item.stop) == ("qa_f1", 128, None)


def test_questions_about_one_context_are_asked_together(tmp_path: Path, write: Write) -> None:
    other = STORY.replace("Ada", "Eve")
    write("qasper.jsonl", row(), row(context=other), row(input="What is it?", answers=["a mill"]), row(context="third"))
    first, second = items(tmp_path, "longbench/qasper", samples=2)
    assert [text(question.answer) for question in first.questions] == [" Ada", " a mill"]
    assert len(second.questions) == 1
    assert second.index == 1
    assert "Eve" in text(second.context)


def test_every_data_set_of_longbench_makes_items(tmp_path: Path, write: Write) -> None:
    for name in DATA_SETS:
        write(f"{name}.jsonl", row(answers=["Paragraph 3"], all_classes=["Paragraph 3", "Paragraph 4"]))
    found = items(tmp_path, "longbench")
    assert [item.task for item in found] == [f"longbench/{name}" for name in DATA_SETS]
    first_lines = {item.task.partition("/")[2] for item in found if item.stop == "\n"}
    assert first_lines == {"trec", "triviaqa", "samsum", "lsht"}
    for item in found:
        assert STORY in text(item.context), "the story stays in the context"
        assert item.metric in METRICS
        if not item.metric.endswith("_zh"):
            assert judge(item.metric, "Paragraph 3", item.questions[0].references) == 1


def test_the_first_reference_of_a_classification_is_right(tmp_path: Path, write: Write) -> None:
    write(
        "trec.jsonl", row(input="Question: Where?\nType:", answers=["Place"], all_classes=["Food", "Place", "Person"])
    )
    (item,) = items(tmp_path, "longbench/trec")
    assert item.questions[0].references == ("Place", "Food", "Person")
    assert text(item.questions[0].answer) == " Place"


def test_a_chat_template_stands_around_context_and_question(tmp_path: Path, write: Write) -> None:
    write("qasper.jsonl", row())
    write("lcc.jsonl", row(input="", context="x = 1\n", answers=["y = 2"]))
    chat = Chat(tuple(tokenize(TOKENIZER, "<user>")), tuple(tokenize(TOKENIZER, "<model>")))
    question, code = items(tmp_path, "longbench/qasper", "longbench/lcc", chat=chat)
    assert whole(question).startswith("<user>")
    assert whole(question).endswith("Answer:<model>Ada")
    assert text(question.questions[0].prompt).endswith("<model>")
    assert "<user>" not in whole(code)
    assert "<model>" not in whole(code)
    assert text(code.questions[0].answer) == "y = 2"


def test_prompts_of_the_authors_are_used_where_they_lie(tmp_path: Path, write: Write) -> None:
    write("data/qasper.jsonl", row())
    prompts = {"qasper": "{input} -- read: {context} -- again: {input} =>"}
    for name, contents in (("dataset2prompt", prompts), ("dataset2maxlen", {"qasper": 7})):
        (tmp_path / "config").mkdir(exist_ok=True)
        (tmp_path / "config" / f"{name}.json").write_text(json.dumps(contents))
    (item,) = items(tmp_path, "longbench/qasper")
    assert text(item.context) == f"<bos>Who built it? -- read: {STORY}"
    assert text(item.questions[0].prompt) == " -- again: Who built it? =>"
    assert item.max_new_tokens == 7


@pytest.mark.parametrize(("prompt", "error"), [("{input}", "no context"), ("{context} {topic}", "no topic")])
def test_a_prompt_that_does_not_fit_the_data_is_an_error(tmp_path: Path, write: Write, prompt: str, error: str) -> None:
    write("qasper.jsonl", row())
    (tmp_path / "dataset2prompt.json").write_text(json.dumps({"qasper": prompt}))
    with pytest.raises(UserError, match=f"tasks=longbench/qasper: .*{error}"):
        items(tmp_path, "longbench/qasper")


@pytest.mark.parametrize(("lengths", "limit", "length"), [((500, 1000), None, 1000), ((2000,), 800, 800)])
def test_long_contexts_lose_their_middle(
    tmp_path: Path, write: Write, lengths: tuple[int, ...], limit: int | None, length: int
) -> None:
    context = "".join(f"Line {number:04}. " for number in range(500))
    write("qasper.jsonl", row(context=context), row(context=context, input="And who, after all, owned it?"))
    (item,) = items(tmp_path, "longbench/qasper", lengths=lengths, limit=limit)
    assert item.length == length
    assert len(item.context) + max(len(x.prompt) for x in item.questions) + item.max_new_tokens == length
    kept = text(item.context)
    assert "Line 0000." in kept
    assert kept.endswith("Line 0499. ")
    assert "Line 0250." not in kept
    assert text(item.questions[0].prompt).endswith("Question: Who built it?\nAnswer:")


def test_the_middle_of_the_prompt_is_cut_as_a_whole() -> None:
    head, context = [0, 1], list(range(2, 22))
    assert cut_middle(head, context, 4, 22) == tuple(range(22))
    # 26 tokens of prompt, 4 of them the tail: of 16, 8 stay at the front, and 4 before the tail
    assert cut_middle(head, context, 4, 12) == (*range(8), *range(18, 22))
    assert cut_middle(head, context, 30, 12) == tuple(range(12)), "a long tail leaves the end of the context"
    assert cut_middle(list(range(9)), context, 0, 12) == (*range(9), *context[-3:]), "a long head stays whole"
    assert cut_middle(head, context, 4, None) == tuple(range(22))
    with pytest.raises(UserError, match="raise lengths"):
        cut_middle(head, context, 4, 2)


def test_what_leaves_no_room_for_the_context_is_an_error(tmp_path: Path, write: Write) -> None:
    write("qasper.jsonl", row())
    with pytest.raises(UserError, match=r"tasks=longbench/qasper, sample 0: .*raise lengths"):
        items(tmp_path, "longbench/qasper", lengths=(200,))


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("qasper", {"answers": 5}, r"qasper.jsonl, line 1: answers\S* is no text"),
        ("trec", {}, r"trec.jsonl, line 1: all_classes=None is no list"),
        ("qasper", None, "holds no rows"),
    ],
)
def test_damaged_rows_are_named(
    tmp_path: Path, write: Write, name: str, change: dict[str, Any] | None, words: str
) -> None:
    write(f"{name}.jsonl", *([] if change is None else [row(**change)]))
    with pytest.raises(UserError, match=words):
        items(tmp_path, f"longbench/{name}")


def test_one_answer_may_be_a_text(tmp_path: Path, write: Write) -> None:
    write("qasper.jsonl", row(answers="Paris"))
    (item,) = items(tmp_path, "longbench/qasper")
    assert item.questions[0].references == ("Paris",)


def test_the_same_data_in_two_formats_is_read_by_neither(tmp_path: Path, write: Write) -> None:
    write("qasper.jsonl", row())
    write("qasper.json", row())
    with pytest.raises(UserError, match="qasper twice"):
        items(tmp_path, "longbench/qasper")


@pytest.mark.parametrize(
    ("file", "contents", "words"),
    [
        ("dataset2maxlen", {"qasper": "many"}, "'many', not a number of tokens"),
        ("dataset2maxlen", {"qasper": -3}, "-3, not a number of tokens"),
        ("dataset2prompt", {"qasper": "{context} {} {input}"}, "no prompt that can be filled in"),
        ("dataset2prompt", {"qasper": "{context} { {input}"}, "no prompt that can be filled in"),
    ],
)
def test_damaged_settings_of_the_data_are_named(
    tmp_path: Path, write: Write, file: str, contents: dict[str, Any], words: str
) -> None:
    write("qasper.jsonl", row())
    (tmp_path / f"{file}.json").write_text(json.dumps(contents))
    with pytest.raises(UserError, match=words):
        items(tmp_path, "longbench/qasper")


@pytest.mark.parametrize("answer", [None, "Paris", "E"])
def test_version_2_needs_letters(tmp_path: Path, write: Write, answer: str | None) -> None:
    write("data.json", {"context": STORY, "question": "?", "answer": answer} | {f"choice_{x}": x for x in "ABCD"})
    with pytest.raises(UserError, match=r"data.json, row 1: answer=\S+ must be 'A'"):
        items(tmp_path, "longbench-v2")


def test_an_answer_must_be_there(tmp_path: Path, write: Write) -> None:
    write("qasper.jsonl", row(answers=["", "Ada"]))
    (item,) = items(tmp_path, "longbench/qasper")
    assert text(item.questions[0].answer) == " Ada"
    write("qasper.jsonl", row(), row(context="empty", answers=[" "]))
    with pytest.raises(UserError, match="tasks=longbench/qasper, sample 1: the data names no answer"):
        items(tmp_path, "longbench/qasper")


@pytest.mark.parametrize("name", ["data.json", "deep/down/data.json"])
def test_version_2_is_answered_with_a_letter(tmp_path: Path, write: Write, name: str) -> None:
    choices = {f"choice_{letter}": word for letter, word in zip("ABCD", ("Ada", "Eve", "Bob", "Cy"), strict=True)}
    write("data/qasper.jsonl", row())  # of version 1, in a folder that is called data
    write(
        name, {"_id": "1", "context": STORY, "question": "Who built it?", "answer": "A", "length": "short", **choices}
    )
    (item,) = items(tmp_path, "longbench-v2")
    assert text(item.context).endswith(STORY)
    prompt = text(item.questions[0].prompt)
    assert "(A) Ada\n(B) Eve\n(C) Bob\n(D) Cy\n" in prompt
    assert prompt.endswith(" The correct answer is (")
    assert text(item.questions[0].answer) == "A"
    assert judge(item.metric, "A) Ada, as the text says", item.questions[0].references) == 1
    assert (item.task, item.max_new_tokens, item.stop) == ("longbench-v2", 128, None)
    chat = Chat((), tuple(tokenize(TOKENIZER, "<model>")))
    (item,) = items(tmp_path, "longbench-v2", chat=chat)
    assert text(item.questions[0].prompt).endswith("Name its letter.<model>The correct answer is (")


NIAH = {"context": "Words.\nThe magic number for oak is 17.\n", "question": "What is the magic number for oak?"}


@pytest.mark.parametrize("name", ["4096/test-00000-of-00001.parquet", "ruler/4096/all.jsonl"])
@pytest.mark.parametrize("inside", ["", "4096"])
def test_ruler_as_on_the_hub(tmp_path: Path, write: Write, name: str, inside: str) -> None:
    """One file for all tasks, and the user gives the folder of all lengths or of one."""
    shared = NIAH | {"answer_prefix": "The magic number for oak is", "answer": ["17"]}
    write(
        name, {"task": "niah_single_1", "max_new_tokens": 9} | shared, {"task": "qa_1", "max_new_tokens": 32} | shared
    )
    folder = (tmp_path / name).parent if inside else tmp_path
    single, answer = items(folder, "ruler-data/niah_single_1", "ruler-data/qa_1", lengths=(4096,))
    assert text(single.context) == f"<bos>{NIAH['context']}"
    assert whole(single).endswith("What is the magic number for oak? The magic number for oak is 17")
    assert single.questions[0].references == ("17",)
    assert (single.length, single.metric, single.max_new_tokens, single.stop) == (4096, "all", 9, None)
    assert (answer.metric, answer.max_new_tokens) == ("any", 32)


@pytest.mark.parametrize("prefix", [False, True])
def test_ruler_as_its_scripts_write_it(tmp_path: Path, write: Write, prefix: bool) -> None:
    cue = " The variables are: "
    written = {"index": 3, "outputs": ["AB", "CD"], "length": 4000, "token_position_answer": 5}
    task = "Remember.\nVAR AB = 5\nVAR CD = VAR AB\nQuestion: Which variables have the value 5?"
    for length in (4096, 8192):
        rows = {"input": task, "answer_prefix": cue} if prefix else {"input": task + cue}
        write(f"some-model/synthetic/{length}/data/vt/validation.jsonl", rows | written)
    four, eight = items(tmp_path, "ruler-data/vt", lengths=(4096, 8192))
    assert (four.length, eight.length) == (4096, 8192)
    assert text(four.context) == "<bos>Remember.\nVAR AB = 5\nVAR CD = VAR AB"
    assert whole(four).endswith("\nQuestion: Which variables have the value 5? The variables are: AB")
    assert text(four.questions[0].answer) == "AB"
    assert (four.metric, four.max_new_tokens) == ("all", 30)
    chat = Chat((), tuple(tokenize(TOKENIZER, "<model>")))
    (item,) = items(tmp_path, "ruler-data/vt", chat=chat, lengths=(4096,))
    ending = "?<model>The variables are: " if prefix else "? The variables are: <model>"
    assert text(item.questions[0].prompt).endswith(ending)


def test_lengths_that_ruler_lacks_or_the_model_cannot_take_are_errors(tmp_path: Path, write: Write) -> None:
    write("4096/vt/validation.jsonl", {"input": "a\nb", "outputs": ["b"]})
    with pytest.raises(UserError, match=r"ruler-data/vt: no data of lengths=8192 in data\.path="):
        items(tmp_path, "ruler-data/vt", lengths=(8192,))
    with pytest.raises(UserError, match="lengths=4096 exceeds the 2048 tokens"):
        items(tmp_path, "ruler-data/vt", lengths=(4096,), limit=2048)


def test_missing_data_says_where_it_is_expected(tmp_path: Path, write: Write) -> None:
    with pytest.raises(
        UserError, match=r"data\.path=.* has no qasper.jsonl.*huggingface.co/datasets/zai-org/LongBench"
    ):
        items(tmp_path, "longbench/qasper")
    with pytest.raises(UserError, match=r"data\.path=.*: no such folder"):
        items(tmp_path / "nowhere", "longbench/qasper")
    write("one/qasper.jsonl", row())
    write("two/qasper.jsonl", row())
    with pytest.raises(UserError, match="qasper twice"):
        items(tmp_path, "longbench/qasper")


@pytest.mark.parametrize(
    ("contents", "error"), [("{", "cannot be read"), ("[1]", "row 1: is no object"), ("{}", "no rows")]
)
def test_broken_files_are_errors(tmp_path: Path, contents: str, error: str) -> None:
    (tmp_path / "qasper.json").write_text(contents)
    with pytest.raises(UserError, match=f"qasper.json.*{error}"):
        items(tmp_path, "longbench/qasper")


def test_without_the_hub_the_error_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise ConnectionError("no network")

    monkeypatch.setattr(sources, "hf_hub_download", refuse)
    monkeypatch.setattr(sources.datasets, "load_dataset", refuse)
    for name in ("longbench/qasper", "longbench-v2", "ruler-data/vt"):
        with pytest.raises(UserError, match=r"huggingface.co/datasets/.* cannot be loaded: no network\. .*data\.path="):
            items(None, name)


def test_what_is_asked_of_the_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[object] = []
    archive = tmp_path / "data.zip"
    with zipfile.ZipFile(archive, "w") as opened:
        opened.writestr("data/qasper.jsonl", json.dumps(row()) + "\n")

    def download(repository: str, name: str, repo_type: str) -> str:
        asked.append((repository, name, repo_type))
        return str(archive)

    def load(repository: str, data_dir: str | None, split: str) -> list[dict[str, Any]]:
        asked.append((repository, data_dir, split))
        return [{"task": "vt", "answer": ["17"]} | NIAH]

    monkeypatch.setattr(sources, "hf_hub_download", download)
    monkeypatch.setattr(sources.datasets, "load_dataset", load)
    (story,) = items(None, "longbench/qasper")
    (oak,) = items(None, "ruler-data/vt", lengths=(4096,))
    assert asked == [("zai-org/LongBench", "data.zip", "dataset"), ("simonjegou/ruler", "4096", "test")]
    assert STORY in text(story.context)
    assert text(oak.questions[0].answer) == " 17"


@pytest.mark.parametrize(
    ("contents", "words"),
    [
        (b"", "holds no rows"),
        (b"\n\n", "holds no rows"),
        (GOOD + GOOD[:-10], r"qasper\.jsonl, line 2, column \d+: not JSON"),
        (GOOD + b"\n[1]\n", r"qasper\.jsonl, line 3: expected a JSON object, found list"),
        (GOOD + GOOD.replace(b'"Who built it?"', b"null"), r"qasper\.jsonl, line 2: input=None is no text"),
        (GOOD.replace(b'"context"', b'"text"'), r"qasper\.jsonl, line 1 lacks context"),
        (GOOD.decode().encode("utf-16"), r"qasper\.jsonl is not a text file in UTF-8"),
        (b"PK\x03\x04\xff", r"qasper\.jsonl is not a text file in UTF-8"),
        (GOOD.replace(b'"length": 80', b'"length": NaN'), r"qasper\.jsonl: nan is no finite number"),
        (GOOD.replace(b'"length": 80', b'"length": ' + b"[" * 10**5), r"qasper\.jsonl, line 1, column \d+: not JSON"),
    ],
    ids=["empty", "blank", "cut-off", "list", "null", "column", "utf-16", "archive", "nan", "deep"],
)
def test_damaged_lines_are_named(tmp_path: Path, contents: bytes, words: str) -> None:
    (tmp_path / "qasper.jsonl").write_bytes(contents)
    with pytest.raises(UserError, match=words) as error:
        items(tmp_path, "longbench/qasper")
    assert str(error.value).isprintable()
    assert str(tmp_path) in str(error.value)


def test_damaged_parquet_is_named(tmp_path: Path, write: Write) -> None:
    (tmp_path / "qasper.parquet").write_bytes(b"PAR1 and nothing")
    with pytest.raises(UserError, match=r"qasper\.parquet cannot be read"):
        items(tmp_path, "longbench/qasper")
    write("qasper.parquet", row(), row() | {"context": None})
    with pytest.raises(UserError, match=r"qasper\.parquet, row 2: context=None is no text"):
        items(tmp_path, "longbench/qasper")


def test_a_ruler_row_is_named_by_its_line(tmp_path: Path, write: Write) -> None:
    write("4096/all.jsonl", {"task": "vt", "answer": ["17"]} | NIAH, {"task": "vt", "answer": [None]} | NIAH)
    with pytest.raises(UserError, match=r"all\.jsonl, line 2: answer\S* is no text"):
        items(tmp_path, "ruler-data/vt", lengths=(4096,))


@pytest.mark.parametrize("field", ["{input:9999999999}", "{input.__class__}", "{input!r}", "{0}"])
def test_a_prompt_asks_for_columns_alone(tmp_path: Path, write: Write, field: str) -> None:
    write("qasper.jsonl", row())
    (tmp_path / "dataset2prompt.json").write_text(json.dumps({"qasper": "{context}" + field}))
    with pytest.raises(UserError, match="is not the name of a column"):
        items(tmp_path, "longbench/qasper")
