import re
from collections import Counter

import pytest

from duo_id.data.samples import SPLITS
from duo_id.data.tracing import WAYS, TracingTask
from duo_id.data.words import WORDS
from duo_id.errors import UserError

SIGN = r"\nFrom ([a-z ]+) one comes to ([a-z ]+)\.\n"
QUESTION = re.compile(r"The way from ([a-z ]+) leads past ([a-z ,]+)\.\n")


def parts(sample, tokenizer):
    """A decoded sample: the text, its signs [(from, to)], where the way begins, and the places answered."""
    text, end, question = tokenizer.decode(sample["input_ids"]).partition("\n\nNo more signs. Now walk.\n")
    assert end
    start, way = QUESTION.fullmatch(question).groups()
    return text, re.findall(SIGN, text), start, way.split(", ")


def test_following_the_signs_gives_the_answers(quick, tokenizer):
    task = TracingTask(quick(), tokenizer, "train")
    for index in range(30):
        sample = task.sample(index, seed=0)
        _, signs, start, way = parts(sample, tokenizer)
        leads = dict(signs)
        assert len(leads) == len(signs) == WAYS * 3
        place = start
        for turn, answer in enumerate(way, start=1):
            place = leads[place]
            assert place == answer
            assert tokenizer.decode(sample["input_ids"][sample["answers"] == turn]) == f" {answer}"
        assert place not in leads  # the way ends there
        assert len(way) == 3


def test_the_other_way_is_as_long_and_shares_no_place(quick, tokenizer):
    task = TracingTask(quick(num_questions=4), tokenizer, "train")
    for index in range(20):
        _, signs, start, way = parts(task.sample(index, seed=0), tokenizer)
        other = {place for sign in signs for place in sign} - {start, *way}
        assert len(other) == 5
        assert sum(set(sign) <= other for sign in signs) == 4


def test_signs_stand_in_random_order_between_the_depths(quick, tokenizer):
    task = TracingTask(
        quick(num_questions=2, length_min=2000, length_max=2000, depth_min=0.2, depth_max=0.6), tokenizer, "train"
    )
    orders = Counter()
    for index in range(60):
        text, signs, start, way = parts(task.sample(index, seed=0), tokenizer)
        sizes = [len(piece.encode()) for piece in re.sub(SIGN, "\0", text.partition("\n\n")[2]).split("\0")]
        places = [sum(sizes[: number + 1]) / sum(sizes) for number in range(len(signs))]
        assert 0.19 < min(places) < max(places) < 0.61
        hops = [(start, way[0]), (way[0], way[1])]
        orders[tuple(map(signs.index, hops))] += 1
    assert len(orders) == 12  # both signs of the way at any of four places


def test_splits_share_no_words(quick, tokenizer):
    words = {}
    for split in SPLITS:
        task = TracingTask(quick(), tokenizer, split)
        signs = [sign for index in range(60) for sign in parts(task.sample(index, seed=0), tokenizer)[1]]
        words[split] = {word for sign in signs for place in sign for word in place.split()}
        assert len(words[split]) == 80
    assert set().union(*words.values()) == set(WORDS)


def test_more_places_than_there_are_words_are_refused(quick, tokenizer):
    long = {"length_min": 9000, "length_max": 9000, "answer_words": 1}
    with pytest.raises(UserError, match=r"data.answer_words=1 makes 80 different phrases, 82 are needed"):
        TracingTask(quick(num_questions=40, **long), tokenizer, "train")
    sample = TracingTask(quick(num_questions=39, **long), tokenizer, "train").sample(0, 0)
    assert len(parts(sample, tokenizer)[3]) == 39
