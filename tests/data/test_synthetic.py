"""What holds for every task that is put together from tokens."""

import re
from collections import Counter

import pytest
import torch

from duo_id.common.errors import UserError
from duo_id.data.registry import DRAFTED
from duo_id.data.samples import SPLITS
from duo_id.data.synthetic import scatter
from tests.data.conftest import find

ASKING = [name for name in DRAFTED if name != "text"]
TOLD = [name for name in ASKING if name != "copying"]  # whose answers are words of ours


@pytest.fixture(params=DRAFTED)
def drafted(request):
    return DRAFTED[request.param]


@pytest.fixture(params=ASKING)
def asking(request):
    return DRAFTED[request.param]


def same(first, second):
    return all(torch.equal(first[key], second[key]) for key in ("input_ids", "labels", "answers"))


def test_length_drawn_is_the_exact_length(drafted, quick, any_tokenizer):
    task = drafted(quick(), any_tokenizer, "train")
    lengths = Counter(len(task.sample(index, seed=0)["input_ids"]) for index in range(60))
    assert set(lengths) == {700, 800, 900}
    assert min(lengths.values()) > 8


def test_columns_have_one_length_and_int64(drafted, quick, any_tokenizer):
    sample = drafted(quick(), any_tokenizer, "test").sample(0, seed=0)
    assert {column.dtype for column in sample.values()} == {torch.int64}
    assert len({column.shape for column in sample.values()}) == 1


def test_sample_is_a_function_of_seed_split_and_index(drafted, quick, tokenizer):
    def sample(seed, split, index):
        return drafted(quick(), tokenizer, split).sample(index, seed)

    assert same(sample(0, "train", 7), sample(0, "train", 7))
    keys = [(0, "train", 7), (1, "train", 7), (0, "test", 7), (0, "train", 8)]
    assert len({tuple(sample(*key)["input_ids"].tolist()) for key in keys}) == 4


def test_splits_draw_independently(drafted, quick, tokenizer):
    def lengths(split):
        task = drafted(quick(), tokenizer, split)
        return [len(task.sample(index, seed=0)["input_ids"]) for index in range(20)]

    assert lengths("train") != lengths("validation") != lengths("test")


def test_labels_mark_what_is_scored(asking, quick, any_tokenizer):
    settings = {score: quick(score=score) for score in ("answers", "questions", "all")}
    samples = {score: asking(chosen, any_tokenizer, "train").sample(0, seed=0) for score, chosen in settings.items()}
    tokens, places = samples["all"]["input_ids"], samples["all"]["answers"]
    scored = {}
    for score, sample in samples.items():
        assert torch.equal(sample["input_ids"], tokens)
        assert torch.equal(sample["answers"], places)
        scored[score] = sample["labels"] != -100
        assert torch.equal(sample["labels"][scored[score]], tokens[scored[score]])
    assert torch.equal(scored["answers"], places > 0)
    assert not (scored["answers"] & scored["questions"]).any()
    first = int(scored["questions"].nonzero()[0])
    assert torch.equal(scored["all"], torch.arange(len(tokens)) >= first)
    separators = scored["all"] & ~scored["answers"] & ~scored["questions"]
    assert separators.any()
    text = any_tokenizer.decode(tokens[separators])
    assert re.fullmatch(r"[\s;.]+", re.sub(r"<0x(..)>", lambda byte: chr(int(byte[1], 16)), text))


@pytest.mark.parametrize("name", TOLD)
def test_answers_stand_in_the_context_once_with_the_same_tokens(quick, any_tokenizer, name):
    task = DRAFTED[name](quick(passkey_words=4, answer_words=4, length_min=900), any_tokenizer, "train")
    for index in range(5):
        sample = task.sample(index, seed=0)
        tokens, answers = sample["input_ids"].tolist(), sample["answers"]
        assert answers.max() == 3
        last = 0
        for turn in (1, 2, 3):
            (places,) = torch.where(answers == turn)
            assert places.tolist() == list(range(int(places[0]), int(places[-1]) + 1))
            assert last < places[0]
            last = int(places[-1])
            answer = sample["input_ids"][places].tolist()
            assert len(any_tokenizer.decode(answer).split()) == 4
            told, asked = find(answer, tokens)
            assert asked == places[0]
            assert told < (answers > 0).nonzero()[0]


def test_leading_tokens_are_the_tokenizers_own(drafted, quick, tokenizer, bos_tokenizer):
    tokens = drafted(quick(), bos_tokenizer, "train").sample(0, seed=0)["input_ids"].tolist()
    assert find([bos_tokenizer.bos_token_id], tokens) == [0]
    assert not find([bos_tokenizer.eos_token_id], tokens)
    plain, task = drafted(quick(), tokenizer, "train").sample(0, seed=0), drafted(quick(), bos_tokenizer, "train")
    assert task.start == [bos_tokenizer.bos_token_id]
    assert not tokenizer.decode(plain["input_ids"][:2]).startswith("<")


@pytest.mark.parametrize(
    ("changes", "limit", "lengths"),
    [
        ({}, None, [700, 800, 900]),
        ({"length_max": None}, 1000, [700, 850, 1000]),
        ({"num_lengths": 1}, None, [700]),
        ({"length_max": 701, "num_lengths": 2}, 701, [700, 701]),
    ],
)
def test_lengths_are_evenly_spaced(drafted, quick, tokenizer, changes, limit, lengths):
    assert drafted(quick(**changes), tokenizer, "train", limit).lengths == lengths


def test_shortest_length_that_the_error_names_is_enough(drafted, quick, any_tokenizer):
    with pytest.raises(UserError, match=r"data.length_min=30 is too short for .*: raise it, or lower data\.") as caught:
        drafted(quick(length_min=30), any_tokenizer, "train")
    assert "\n" not in str(caught.value)
    needed = int(re.search(r"need (\d+) tokens", str(caught.value))[1])
    task = drafted(quick(length_min=needed, num_lengths=1), any_tokenizer, "train")
    samples = [task.sample(index, seed=0) for index in range(50)]
    assert {len(sample["input_ids"]) for sample in samples} == {needed}
    assert all((sample["labels"] >= 0).any() for sample in samples)
    with pytest.raises(UserError, match=f"need {needed} tokens"):
        drafted(quick(length_min=needed - 1), any_tokenizer, "train")


@pytest.mark.parametrize(
    ("changes", "limit", "message"),
    [
        ({}, 800, "data.length_max=900 exceeds the 800 tokens that the model takes"),
        ({"length_max": None}, 600, "data.length_min=700 exceeds the 600 tokens"),
        ({"length_max": None}, None, "set data.length_max"),
        ({"length_max": 10**6}, None, "lower data.length_max .* or use a longer one"),
    ],
)
def test_lengths_that_do_not_fit_are_named_in_one_line(drafted, quick, tokenizer, changes, limit, message):
    with pytest.raises(UserError, match=message) as caught:
        drafted(quick(**changes), tokenizer, "train", limit)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["key_value", "copying", "multi_query"])
def test_more_questions_than_a_context_holds_are_refused(quick, tokenizer, name):
    with pytest.raises(UserError, match=r"data.num_questions") as caught:
        DRAFTED[name](quick(num_questions=40), tokenizer, "train")
    assert "\n" not in str(caught.value)


def test_longest_length_grows_evenly_over_the_curriculum(drafted, quick, tokenizer):
    task = drafted(quick(num_lengths=5, curriculum=8), tokenizer, "train")
    lengths = [{len(task.sample(index, seed)["input_ids"]) for seed in range(25)} for index in range(9)]
    assert [max(drawn) for drawn in lengths] == [700, 700, 750, 750, 800, 800, 850, 850, 900]
    assert all(min(drawn) == 700 for drawn in lengths)
    assert [len(drawn) for drawn in lengths] == [1, 1, 2, 2, 3, 3, 4, 4, 5]


def test_curriculum_ends_and_is_for_training_alone(drafted, quick, tokenizer):
    for split in SPLITS:
        with_it, without = (drafted(quick(curriculum=curriculum), tokenizer, split) for curriculum in (50, 0))
        first = 50 if split == "train" else 0
        assert all(same(with_it.sample(index, 0), without.sample(index, 0)) for index in range(first, first + 10))


def test_scatter_puts_needles_at_their_depths():
    assert scatter("abcd", [(0.0, "X"), (0.5, "YY"), (0.5, "Z"), (1.0, "W")]) == list("XabYYZcdW")
    assert scatter([[1], [2]], [(0.5, [[9]])]) == [[1], [9], [2]]
    assert scatter("", [(0.3, "X")]) == ["X"]
