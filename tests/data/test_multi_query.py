import re
from collections import Counter

import pytest

from duo_id.common.errors import UserError
from duo_id.data.multi_query import MultiQueryTask
from duo_id.data.samples import SPLITS
from duo_id.data.words import NAMES, THINGS, WORDS

FACT = r"\nThe (\w+) of (\w+) is ([a-z ]+)\.\n"
QUESTION = re.compile(r"Say, one after the other, the (.*)\. Listed in just that order: ([a-z ;]+)\.\n")


def parts(sample, tokenizer):
    """A decoded sample: the text, {(thing, name): words} of its facts, what is asked for, and what is answered."""
    text, end, question = tokenizer.decode(sample["input_ids"]).partition(
        "\n\nNothing more is told. Now answer all at once.\n"
    )
    assert end
    facts = re.findall(FACT, text)
    asked, answered = QUESTION.fullmatch(question).groups()
    told = {(thing, name): words for thing, name, words in facts}
    assert len(told) == len(facts)  # each is told once
    return text, told, [tuple(topic.split(" of ")) for topic in asked.split(", the ")], answered.split("; ")


def test_answers_are_listed_in_the_order_asked(quick, tokenizer):
    task = MultiQueryTask(quick(), tokenizer, "train")
    for index in range(30):
        sample = task.sample(index, seed=0)
        _, facts, asked, answered = parts(sample, tokenizer)
        assert len(asked) == len(set(asked)) == 3
        assert [facts[topic] for topic in asked] == answered
        for place, words in enumerate(answered, start=1):
            assert tokenizer.decode(sample["input_ids"][sample["answers"] == place]) == f" {words}"


def test_each_thing_is_told_of_two_people_and_asked_of_one(quick, tokenizer):
    task = MultiQueryTask(quick(), tokenizer, "train")
    for index in range(30):
        _, facts, asked, _ = parts(task.sample(index, seed=0), tokenizer)
        assert Counter(thing for thing, _ in facts) == dict.fromkeys((thing for thing, _ in asked), 2)
        assert set(asked) < set(facts)


def test_facts_and_questions_are_in_random_order(quick, tokenizer):
    task = MultiQueryTask(quick(length_min=900), tokenizer, "train")
    orders, first_is_asked = Counter(), 0
    for index in range(80):
        _, facts, asked, _ = parts(task.sample(index, seed=0), tokenizer)
        places = [list(facts).index(topic) for topic in asked]
        orders[tuple(sorted(range(3), key=places.__getitem__))] += 1
        first_is_asked += 0 in places
    assert len(orders) == 6
    assert 20 < first_is_asked < 60


def test_one_thing_is_a_list_of_one(quick, tokenizer):
    sample = MultiQueryTask(quick(num_questions=1), tokenizer, "train").sample(0, seed=0)
    _, facts, asked, answered = parts(sample, tokenizer)
    assert len(facts) == 2
    assert [facts[asked[0]]] == answered


def test_facts_are_spread_between_the_depths(quick, tokenizer):
    task = MultiQueryTask(
        quick(num_questions=2, length_min=2000, length_max=2000, depth_min=0.2, depth_max=0.6), tokenizer, "train"
    )
    depths = []
    for index in range(40):
        text, facts, asked, _ = parts(task.sample(index, seed=0), tokenizer)
        sizes = [len(piece.encode()) for piece in re.sub(FACT, "\0", text.partition("\n\n")[2]).split("\0")]
        places = [sum(sizes[: number + 1]) / sum(sizes) for number in range(len(facts))]
        depths.append(sorted(place for place, topic in zip(places, facts, strict=True) if topic in asked))
        assert 0.19 < min(places) < max(places) < 0.61
    assert all(first < 0.41 and second > 0.39 for first, second in depths)


def test_splits_share_no_words(quick, tokenizer):
    found = {}
    for split in SPLITS:
        task = MultiQueryTask(quick(), tokenizer, split)
        facts = [fact for index in range(60) for fact in parts(task.sample(index, seed=0), tokenizer)[1].items()]
        things, names, words = (
            {text for texts in column for text in texts.split()}
            for column in zip(*((thing, name, words) for (thing, name), words in facts), strict=True)
        )
        assert (len(things), len(names), len(words)) == (12, 20, 80)
        found[split] = things | names | words
    assert set().union(*found.values()) == {*THINGS, *NAMES, *WORDS}
    assert sum(map(len, found.values())) == len(THINGS) + len(NAMES) + len(WORDS)


def test_more_things_than_there_are_is_refused(quick, tokenizer):
    with pytest.raises(UserError, match=r"data.num_questions=13 must be at most 12 with data=multi_query"):
        MultiQueryTask(quick(num_questions=13, length_min=9000, length_max=9000), tokenizer, "train")
    sample = MultiQueryTask(quick(num_questions=12, length_min=9000, length_max=9000), tokenizer, "train").sample(0, 0)
    assert len(parts(sample, tokenizer)[2]) == 12
