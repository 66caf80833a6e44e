import re

import pytest

from duo_id.data.words import MAX_ORDINAL, NAMES, THINGS, WORDS, ordinal


@pytest.mark.parametrize(("words", "count"), [(WORDS, 240), (THINGS, 36), (NAMES, 60)])
def test_words_are_different_and_alike(words, count):
    assert len(words) == len(set(words)) == count
    assert all(re.fullmatch("[A-Z]?[a-z]{2,12}", word) for word in words)


def test_lists_share_no_word():
    assert len({word.lower() for word in (*WORDS, *THINGS, *NAMES)}) == len(WORDS) + len(THINGS) + len(NAMES)


def test_ordinals():
    names = [ordinal(number) for number in range(1, MAX_ORDINAL + 1)]
    assert len(set(names)) == 99
    expected = {1: "first", 12: "twelfth", 20: "twentieth", 32: "thirty-second", 40: "fortieth", 99: "ninety-ninth"}
    assert {number: names[number - 1] for number in expected} == expected
