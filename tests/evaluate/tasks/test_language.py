from collections import Counter
from collections.abc import Callable
from itertools import pairwise

import pytest

from duo_id.common.errors import UserError
from duo_id.evaluate.items import SPLITS, Item
from duo_id.evaluate.tasks.language import _repetitions
from duo_id.evaluate.tasks.registry import make_items
from tests.data.conftest import make_haystack as make_haystack
from tests.evaluate.tasks.making import builder_of, items_of


def occurrences(tokens: tuple[int, ...], piece: tuple[int, ...]) -> list[int]:
    """All indices where a piece begins."""
    return [start for start in range(len(tokens)) if tokens[start : start + len(piece)] == piece]


@pytest.mark.parametrize("length", [512, 2048])
@pytest.mark.parametrize("split", SPLITS)
def test_blocks_go_evenly_to_the_end(split: str, length: int) -> None:
    (item,) = items_of("language", "smollm2", split, length=length)
    starts = [question.place for question in item.questions]
    sizes = {len(question.answer) for question in item.questions}
    assert len(item.context) == length
    assert sizes == {60 if length == 512 else 64}, "as long as they do not overlap"
    assert starts[0] == 32
    assert starts[-1] == length - max(sizes)
    assert len(starts) == 8
    steps = {second - first for first, second in pairwise(starts)}
    assert max(steps) - min(steps) <= 1
    assert min(steps) >= max(sizes)
    assert [question.depth for question in item.questions] == [start / length for start in starts]


@pytest.mark.parametrize("length", [512, 1024, 4096])
@pytest.mark.parametrize("split", SPLITS)
def test_rare_ngrams_were_seen_once_before_and_far_away(split: str, length: int) -> None:
    for item in items_of("rare-ngrams", "smollm2", split, samples=3, length=length):
        assert 4 <= len(item.questions) <= 8
        for question in item.questions:
            begin = question.place - 1  # the first token of the n-gram is not scored
            gram = item.context[begin : begin + 1 + len(question.answer)]
            assert len(gram) >= 3
            first, second, *further = occurrences(item.context, gram)
            assert second == begin
            assert not further
            assert second - first >= min(length // 4, 256)
            assert question.depth == first / length
        assert not overlaps(item)


def overlaps(item: Item) -> list[int]:
    """Tokens that are scored more than once."""
    scored = Counter(
        index for question in item.questions for index in range(question.place, question.place + len(question.answer))
    )
    return [index for index, times in scored.items() if times > 1]


def test_repetitions_against_a_text_made_by_hand() -> None:
    hay = list(range(100, 500))
    hay[300:305] = hay[20:25]  # five tokens, 280 apart
    hay[310:312] = hay[40:42]  # a bigram
    hay[60:64] = hay[10:14]  # too close
    hay[320:323] = hay[330:333] = hay[50:53]  # three times
    assert _repetitions(hay, 3, 16) == [(20, 300, 5)]
    assert _repetitions(hay, 3, 4) == [(20, 300, 4)]
    hay[350] = hay[360] = hay[22]  # one of its tokens occurs elsewhere, but the others still make it rare
    assert _repetitions(hay, 3, 16) == [(20, 300, 5)]
    for token, position in zip(hay[20:25], range(370, 380, 2), strict=True):
        hay[position] = token  # now it is made of tokens that are common
    assert _repetitions(hay, 3, 16) == []


def test_a_haystack_that_only_repeats_itself_has_no_rare_ngrams(make_haystack: Callable) -> None:
    haystack = make_haystack(["on and on and " * 2000], "test")
    with pytest.raises(UserError, match=r"rare-ngrams finds no unique n-grams .* leave it out of tasks"):
        make_items(["rare-ngrams"], builder_of(haystack=haystack), [2600], 1, 0, None, 3)
    with pytest.raises(UserError, match=r"copying finds fewer than 3 unique passages: leave copying out of tasks"):
        make_items(["copying"], builder_of(haystack=haystack), [2600], 1, 0, None, 3)


def test_text_that_names_the_subjects_is_refused(make_haystack: Callable) -> None:
    names = " ".join(builder_of().words.names)
    haystack = make_haystack([f"{names} " * 200], "test")
    with pytest.raises(
        UserError, match="needs 3 names that its haystack does not contain, but there are only 0: lower"
    ):
        make_items(["needle-numbers"], builder_of(haystack=haystack), [2600], 1, 0, None, 3)
