import random
import re
import string
import sys

import pytest

from duo_id.data.registry import DRAFTED
from duo_id.data.words import NAMES, THINGS, WORDS
from duo_id.evaluate.items import SPLITS
from duo_id.evaluate.tasks import long_answers, lookup, needles, ruler, rules
from duo_id.evaluate.tasks.registry import EVALUATION_TASKS
from duo_id.evaluate.tasks.words import VOCABULARIES
from tests.evaluate.tasks.making import builder_of, items_of, text

TEMPLATES = [
    value
    for module in (needles, ruler, lookup, rules, long_answers)
    for value in vars(module).values()
    if isinstance(value, dict) and value.keys() == set(SPLITS)
]


TRAINING = {sys.modules[task.__module__] for task in DRAFTED.values()}


def runs(text: str) -> set[str]:
    """All runs of four words in a text, regardless of the names of its placeholders."""
    words = re.sub(r"\{\w*\}", "{}", text).split()
    return {" ".join(words[start : start + 4]) for start in range(len(words) - 3)}


def strings(value: object) -> set[str]:
    """All strings in nested tuples."""
    return {value} if isinstance(value, str) else {text for part in value for text in strings(part)}  # type: ignore[attr-defined]


def words_of(split: str) -> list[str]:
    vocabulary = VOCABULARIES[split]
    topics = " ".join(lookup.TOPICS[split]).split() + lookup.OWNERSHIP[split][2].split()
    return [*vocabulary.nouns, *vocabulary.adjectives, *vocabulary.cities, *vocabulary.names, *topics]


def test_no_word_is_in_both_splits_or_in_training() -> None:
    development, test = map(words_of, SPLITS)
    assert not set(development) & set(test)
    trained = {word.lower() for word in (*WORDS, *THINGS, *NAMES)}
    assert not {word.lower() for word in development + test} & trained
    for words in (development, test):
        assert len(words) > 280
        assert len(words) == len(set(words))
        assert all(re.fullmatch("[A-Z]?[a-z]+", word) for word in words)


def test_made_up_words_are_different_and_share_no_consonant_with_the_other_split() -> None:
    development, test = (set(VOCABULARIES[split].made_up(random.Random(0), 20_000)) for split in SPLITS)
    assert len(development) == len(test) == 20_000
    assert all(len(word) == 6 for word in development)
    assert not (set("".join(development)) & set("".join(test))) - set("aeiou")


def test_all_made_up_words_are_different() -> None:
    vocabulary = VOCABULARIES["test"]
    words = vocabulary.made_up(random.Random(0), vocabulary.num_made_up)
    assert len(set(words)) == vocabulary.num_made_up


def test_things_are_an_adjective_and_a_noun_each_pair_once() -> None:
    vocabulary = VOCABULARIES["development"]
    things = vocabulary.things(random.Random(0), vocabulary.num_things)
    assert len(set(things)) == vocabulary.num_things > 9000
    assert {tuple(thing.split()) for thing in things} == {
        (adjective, noun) for adjective in vocabulary.adjectives for noun in vocabulary.nouns
    }


def test_no_sentence_is_in_both_splits_or_in_training() -> None:
    assert len(TEMPLATES) >= 14
    trained = set()
    for module in TRAINING:
        values = [value for name, value in vars(module).items() if isinstance(value, str) and name.isupper()]
        trained |= runs(" ".join(values))  # adjacent strings in a module are adjacent in its samples too
    assert len(trained) > 100
    development, test = ({text for value in TEMPLATES for text in strings(value[split])} for split in SPLITS)
    assert not development & test
    for sentence in development | test:
        assert not trained & runs(sentence), sentence


def test_templates_are_sentences() -> None:
    for value in TEMPLATES:
        for split in SPLITS:
            for sentence in strings(value[split]):
                starts_lower = value in (lookup.TOPICS, lookup.OWNERSHIP)
                assert sentence[0] in string.ascii_uppercase + "{" or starts_lower, sentence
                assert "  " not in sentence


@pytest.mark.parametrize("task", EVALUATION_TASKS)
def test_splits_share_no_line_of_their_samples(task: str) -> None:
    """Neither words nor sentences nor haystack; short lines of the haystack such as "Returns True" do not count."""
    lines, shortest = [], 15 if task == "short" else 30
    for split in SPLITS:
        items = items_of(task, split=split)
        prompts = [text(question.prompt) for item in items for question in item.questions]
        found = "\n".join([text(item.context) for item in items] + prompts).split("\n")
        lines.append({line.strip() for line in found if len(line.strip()) > shortest})
    assert len(lines[0]) > 0
    assert not lines[0] & lines[1]


def test_haystacks_of_the_splits_are_the_halves_of_one_stream() -> None:
    development, test = (builder_of(split=split).haystack for split in SPLITS)
    assert development.documents is test.documents
    assert (development.start, development.stop) == (0, test.start)
