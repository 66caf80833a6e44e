"""A perfect reader, which searches the context's text for the answer to the question's text, is always right."""

import json
import re
from collections import Counter
from collections.abc import Callable
from itertools import pairwise

import pytest

from duo_id.evaluate.items import SPLITS
from duo_id.evaluate.metrics import METRICS
from duo_id.evaluate.tasks import lookup
from tests.evaluate.tasks.making import ASKED, items_of, some, text


def after(context: str, prompt: str) -> str:
    """What follows the beginning of the answer in the context, up to the end of the line."""
    beginning = prompt.rpartition("\n")[2]
    (answer,) = re.findall(rf"\n{re.escape(beginning)}(.*)\n", context)
    return answer


def numbers_of(context: str, prompt: str) -> str:
    """All numbers of the things in the question, one thing after another."""
    things = re.findall(r"the ([a-z]+ [a-z]+)(?=,| and the|\?)", prompt.rpartition("\n")[0])
    numbers = []
    for thing in things:
        numbers += re.findall(rf"\n[A-Z][^\n]*the {thing} [^\n]* (\d{{6}})\n", context)
    return ", ".join(numbers)


def variables(context: str, prompt: str) -> str:
    """Names that resolve to the number in the question, in the order of the text."""
    number = re.search(r"\d{5}", prompt)[0]
    names: list[str] = []
    for name, value in re.findall(r"\n(?:Set|Label box) ([a-z]{6}) (?:to|like) (\w+)\.\n", context):
        if value in (number, *names):
            assert (value == number) == (names == []), "one has it directly"
            names.append(name)
    assert len(names) == 5
    return ", ".join(names)


def most_frequent(context: str, prompt: str) -> str:
    """The most frequent words of the list at the end."""
    counts = Counter(context.rpartition(":\n")[2].split())
    count = int(re.search(r"\d+", prompt)[0])
    (*_, (_, last)), ((_, next_best), *_) = counts.most_common(count), counts.most_common()[count:]
    assert last > 2 * next_best or count == 3, "common words are far more frequent"
    assert last > next_best
    return ", ".join(word for word, _ in counts.most_common(count))


def value(context: str, prompt: str) -> str:
    """The value of a key of valid JSON."""
    return json.loads(context[context.index("{\n") :])[re.search(r'"(\w+)"', prompt)[1]]


def reordered(context: str, prompt: str) -> str:
    """The list about the person in the question, reversed or sorted."""
    person = next(word for word in re.findall(r"[A-Z][a-z]+", prompt) if f"The list of {word}:" in context
                  or f"What {word} bought:" in context)  # fmt: skip
    words = re.search(rf"\n(?:The list of|What) {person}(?: bought)?: (.*)\n", context)[1].split(", ")
    assert len(words) == 6
    return ", ".join(sorted(words) if "alphabetical" in prompt else words[::-1])


def label(context: str, prompt: str) -> str:
    """The label of the only topic whose examples share a word with the question, if there is one."""
    sentence_asked = re.search(r": (.*)\n", prompt)[1]
    labels: dict[str, set[str]] = {}
    for sentence, found in re.findall(r"\n(?:Sentence|Remark): (.*)\n(?:Label|Class): (\w+)\n", context):
        assert sentence != sentence_asked
        for word in re.findall(r"\w+", sentence):
            labels.setdefault(word, set()).add(found)
    topic = next(word for word in re.findall(r"\w+", sentence_asked) if word in TOPICS)
    (found,) = labels.get(topic, {""})
    return found


TOPICS = {word for topics in lookup.TOPICS.values() for words in topics for word in words.split()}
READERS: dict[str, Callable[[str, str], str]] = {
    "ruler-multivalue": numbers_of,
    "ruler-multiquery": numbers_of,
    "ruler-variables": variables,
    "ruler-common-words": most_frequent,
    "ruler-frequent-words": most_frequent,
    "json-lookup": value,
    "list-reorder": reordered,
}


@pytest.mark.parametrize("task", [task for task in ASKED if task != "classification"])
def test_a_perfect_reader_answers_everything(task: str) -> None:
    samples = some(task, 4)
    assert {split for _, split, _ in samples} == {"development", "test"}
    for item, _, context in samples:
        for question in item.questions:
            answer = READERS.get(task, after)(context, text(question.prompt))
            assert METRICS[item.metric](answer, question.references) == 1, (context, text(question.prompt), answer)
            assert answer.strip() == text(question.answer).strip(), "in the order that is scored"


def test_labels_follow_from_the_examples() -> None:
    """The sentence in the question is new; the word of its topic is in the examples unless there are few."""
    right, total = 0, 0
    for item, _, context in some("classification", 4):
        for question in item.questions:
            answer = label(context, text(question.prompt))
            assert answer in ("", *question.references)
            right, total = right + bool(answer), total + 1
        labels = Counter(re.findall(r"\n(?:Label|Class): (\w+)\n", context))
        assert len(labels) == 4
        assert max(labels.values()) - min(labels.values()) <= 1, "examples are balanced"
        assert {question.references[0] for question in item.questions} == set(labels)
    assert right > total / 2


@pytest.mark.parametrize("task", ["needle-words", "needle-numbers", "needle-sentences", "passkeys", "ruler-single"])
def test_needles_stand_at_their_depth_between_words_and_about_different_subjects(task: str) -> None:
    for item, _, context in some(task):
        beginnings = [text(question.prompt).rpartition("\n")[2] for question in item.questions]
        needle = "|".join(rf"\n{re.escape(beginning)}.*\n" for beginning in beginnings)
        head, _, body = context.partition("\n\n")
        hay, *pieces = re.split(needle, body)
        assert len(head) > 40
        size = sum(map(len, [hay, *pieces]))
        for number, question in enumerate(item.questions):
            tokens_before = sum(map(len, [hay, *pieces][: number + 1]))
            assert question.depth is not None
            assert question.depth * size - 25 <= tokens_before <= question.depth * size + 1
        assert len(set(beginnings)) == len(beginnings)
        if task.startswith("needle"):
            assert [question.depth for question in item.questions] == [0, 0.5, 1]
        for left, right in pairwise([hay, *pieces]):
            cut = re.search(r"\S*$", left)[0] + re.match(r"\S*", right)[0]
            assert left == "" or right[:1].isspace() or right == "" or len(cut) > 20, "needles stand between words"


@pytest.mark.parametrize("task", ["ruler-multikey", "json-lookup", "classification"])
def test_entries_fill_the_context(task: str) -> None:
    for item, _, context in some(task):
        entries = re.findall(r'\n"|\n(?:A registered|He once)|\n(?:Sentence|Remark)', context)
        front = re.split(r"\n\n(?:Some|A coll|Here|Look|Every|Remarks)", context)[0]
        assert len(entries) >= 25
        assert 0 < len(front.encode()) < len(context.encode()) / 15, "hay fills only what is too small for an entry"
        depths = [question.depth for question in item.questions if question.depth is not None]
        assert depths == sorted(depths)
        assert depths == [] or (depths[0] <= 0.3 and depths[-1] >= 0.7)


def test_copied_passages_are_far_from_the_question_and_one_line() -> None:
    for item, _, context in some("copying"):
        assert len(item.questions) == 3
        for question in item.questions:
            (reference,) = question.references
            assert context.index(reference) < 0.85 * len(context)
            assert "\n" not in reference
            assert len(question.answer) == 24 * 4  # a token of an ordinary tokenizer is four bytes
            assert " ".join(context.split()).count(reference[:40]) == 1, "not even its beginning occurs elsewhere"


def test_lists_are_given_early() -> None:
    for item, _, context in some("list-reorder"):
        start = re.search(r"\n(?:The list of|What) \w+(?: bought)?:", context).start()
        assert start < 0.12 * len(context)
        assert all(question.depth == item.questions[0].depth <= 0.1 for question in item.questions)


@pytest.mark.parametrize("length", [2600, 12_000])
def test_common_words_are_ten_times_as_frequent_as_others_however_long(length: int) -> None:
    for split in SPLITS:
        (item,) = items_of("ruler-common-words", split=split, length=length)
        hay, _, word_list = text(item.context).rpartition("\n\n")
        assert len(hay) < 30, "words fill the context"
        counts = Counter(word_list.partition(":\n")[2].split())
        common = [counts.pop(word) for word in item.questions[0].references]
        assert len(common) == 10
        assert len(set(common)) == 1
        assert common[0] >= 10
        assert max(counts.values()) - min(counts.values()) <= 1
        assert common[0] / (sum(counts.values()) / len(counts)) == pytest.approx(10, rel=0.15)


def test_frequent_words_fall_with_the_square_of_their_rank() -> None:
    for item, _, context in some("ruler-frequent-words"):
        ranked = [count for _, count in Counter(context.rpartition(":\n")[2].split()).most_common()]
        assert len(context.rpartition("\n\n")[0]) < len(context) / 10, "words fill the context"
        assert ranked[:5] == [ranked[0] // rank**2 for rank in range(1, 6)]
        words = [word for word, _ in Counter(context.rpartition(":\n")[2].split()).most_common(3)]
        assert list(item.questions[0].references) == words, "the most frequent first"
