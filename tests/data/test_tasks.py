import re
from collections import Counter

import pytest
import torch

from duo_id.data.samples import SPLITS
from duo_id.data.tasks import TASKS, PasskeyTask, make_task
from duo_id.data.words import MAX_ORDINAL, WORDS, ordinal
from duo_id.errors import UserError

ORDINALS = ["first", "second", "third"]
TEXT_END = "\n\nThe text ends here. Now recall the passkeys.\n"


def parts(sample, tokenizer):
    """A decoded sample: the text with the needles, [(ordinal, words)] of the needles, and the same of the questions."""
    text, end, questions = tokenizer.decode(sample["input_ids"]).partition(TEXT_END)
    assert end
    needles = re.findall(r"\nRemember: the ([a-z-]+) passkey is: ([a-z ]+)\.\n", text)
    asked = re.findall(r"What is the ([a-z-]+) passkey\? The ([a-z-]+) passkey is: ([a-z ]+)\n", questions)
    assert all(first == second for first, second, _ in asked)
    return text, needles, [(name, words) for name, _, words in asked]


def find(piece, tokens):
    """The places where the list `piece` stands in the list `tokens`."""
    return [place for place in range(len(tokens)) if tokens[place : place + len(piece)] == piece]


def test_length_drawn_is_the_exact_length(quick, any_tokenizer):
    task = PasskeyTask(quick(), any_tokenizer, "train")
    lengths = Counter(len(task.sample(index, seed=0)["input_ids"]) for index in range(90))
    assert set(lengths) == {700, 800, 900}
    assert min(lengths.values()) > 15


def test_columns_have_one_length_and_int64(quick, any_tokenizer):
    sample = PasskeyTask(quick(), any_tokenizer, "test").sample(0, seed=0)
    assert {column.dtype for column in sample.values()} == {torch.int64}
    assert len({column.shape for column in sample.values()}) == 1


def test_every_needle_is_there_once_and_matches_its_answer(quick, tokenizer):
    task = PasskeyTask(quick(), tokenizer, "train")
    for index in range(20):
        _, needles, asked = parts(task.sample(index, seed=0), tokenizer)
        assert sorted(name for name, _ in needles) == ORDINALS
        assert sorted(needles) == sorted(asked)
        assert all(len(words.split()) == 2 and set(words.split()) <= set(WORDS) for _, words in asked)


def test_needles_and_questions_are_in_random_order(quick, tokenizer):
    task = PasskeyTask(quick(), tokenizer, "train")
    samples = [parts(task.sample(index, seed=0), tokenizer) for index in range(100)]
    for part in (1, 2):
        orders = Counter(tuple(name for name, _ in sample[part]) for sample in samples)
        assert len(orders) == 6  # all orders of three
        assert min(orders.values()) >= 5


def test_answer_tokens_are_those_of_the_needle(quick, any_tokenizer):
    sample = PasskeyTask(quick(passkey_words=4), any_tokenizer, "train").sample(3, seed=0)
    tokens, answers = sample["input_ids"].tolist(), sample["answers"]
    for turn in (1, 2, 3):
        (places,) = torch.where(answers == turn)
        assert places.tolist() == list(range(int(places[0]), int(places[-1]) + 1))
        answer = sample["input_ids"][places].tolist()
        assert len(any_tokenizer.decode(answer).split()) == 4
        in_needle, in_answer = find(answer, tokens)
        assert in_answer == places[0]
        assert in_needle < (answers > 0).nonzero()[0]


def test_answers_count_in_the_order_asked(quick, tokenizer):
    sample = PasskeyTask(quick(), tokenizer, "train").sample(0, seed=0)
    _, _, asked = parts(sample, tokenizer)
    for turn, (_, words) in enumerate(asked, start=1):
        assert tokenizer.decode(sample["input_ids"][sample["answers"] == turn]) == f" {words}"


def test_labels_are_the_answers_or_the_questions_too(quick, tokenizer):
    sample = PasskeyTask(quick(), tokenizer, "train").sample(0, seed=0)
    tokens, answers = sample["input_ids"], sample["answers"]
    assert torch.equal(sample["labels"], torch.where(answers > 0, tokens, -100))
    sample = PasskeyTask(quick(score_questions=True), tokenizer, "train").sample(0, seed=0)
    assert torch.equal(sample["input_ids"], tokens)
    assert torch.equal(sample["answers"], answers)
    questions = tokenizer.decode(tokens).partition(TEXT_END)[2]
    num_scored = len(questions.encode())  # one token a byte
    assert (sample["labels"][:-num_scored] == -100).all()
    assert torch.equal(sample["labels"][-num_scored:], tokens[-num_scored:])


@pytest.mark.parametrize("depth", [0.0, 0.25, 1.0])
def test_needles_stand_at_their_depth(quick, tokenizer, depth):
    sample = PasskeyTask(quick(depth_min=depth, depth_max=depth), tokenizer, "train").sample(0, seed=0)
    text = parts(sample, tokenizer)[0]
    introduction = "Passkeys are hidden in the text below. Read it and keep each of them in mind.\n\n"
    assert text.startswith(introduction)
    before, first, _ = text.removeprefix(introduction).partition("\nRemember")
    after = text.rpartition(".\n")[2] if depth < 1 else ""
    hay = re.sub(r"\nRemember: the [a-z]+ passkey is: [a-z ]+\.\n", "", text.removeprefix(introduction))
    assert first
    assert len(before.encode()) == round(depth * len(hay.encode()))
    assert hay.endswith(after)


def test_depths_fill_their_range(quick, tokenizer):
    task = PasskeyTask(quick(length_min=900, depth_min=0.2, depth_max=0.6), tokenizer, "train")
    depths = []
    for index in range(60):
        text = parts(task.sample(index, seed=0), tokenizer)[0].partition("\n\n")[2]
        pieces = re.split(r"\nRemember: the [a-z]+ passkey is: [a-z ]+\.\n", text)
        sizes = [len(piece) for piece in pieces]
        depths += [sum(sizes[:place]) / sum(sizes) for place in (1, 2, 3)]
    assert 0.19 < min(depths) < 0.22
    assert 0.58 < max(depths) < 0.61


def test_sample_is_a_function_of_seed_split_and_index(quick, tokenizer):
    def tokens(seed, split, index):
        return tuple(PasskeyTask(quick(), tokenizer, split).sample(index, seed)["input_ids"].tolist())

    assert tokens(0, "train", 7) == tokens(0, "train", 7)
    keys = [(0, "train", 7), (1, "train", 7), (0, "test", 7), (0, "train", 8)]
    assert len({tokens(*key) for key in keys}) == 4


def test_splits_draw_independently(quick, tokenizer):
    def lengths(split):
        task = PasskeyTask(quick(), tokenizer, split)
        return [len(task.sample(index, seed=0)["input_ids"]) for index in range(20)]

    assert lengths("train") != lengths("validation") != lengths("test")


def test_splits_share_no_words(quick, tokenizer):
    words = {}
    for split in SPLITS:
        task = PasskeyTask(quick(passkey_words=3), tokenizer, split)
        samples = (parts(task.sample(index, seed=0), tokenizer) for index in range(40))
        words[split] = {word for _, _, asked in samples for _, passkey in asked for word in passkey.split()}
        assert len(words[split]) > 70
    assert not words["train"] & words["validation"]
    assert not words["train"] & words["test"]
    assert not words["validation"] & words["test"]


def test_leading_tokens_are_the_tokenizers_own(quick, tokenizer, bos_tokenizer):
    sample = PasskeyTask(quick(), bos_tokenizer, "train").sample(0, seed=0)
    assert bos_tokenizer.decode(sample["input_ids"][:2]) == "<s>P"
    assert find([bos_tokenizer.bos_token_id], sample["input_ids"].tolist()) == [0]
    assert not find([bos_tokenizer.eos_token_id], sample["input_ids"].tolist())
    sample = PasskeyTask(quick(), tokenizer, "train").sample(0, seed=0)
    assert tokenizer.decode(sample["input_ids"][:2]) == "Pa"


@pytest.mark.parametrize(
    ("changes", "limit", "lengths"),
    [
        ({}, None, [700, 800, 900]),
        ({"length_max": None}, 1000, [700, 850, 1000]),
        ({"num_lengths": 1}, None, [700]),
        ({"length_max": 701, "num_lengths": 2}, 701, [700, 701]),
    ],
)
def test_lengths_are_evenly_spaced(quick, tokenizer, changes, limit, lengths):
    assert PasskeyTask(quick(**changes), tokenizer, "train", limit).lengths == lengths


def test_shortest_length_that_the_error_names_is_enough(quick, any_tokenizer):
    with pytest.raises(UserError, match=r"data.length_min=30 is too short") as caught:
        PasskeyTask(quick(length_min=30), any_tokenizer, "train")
    needed = int(re.search(r"need (\d+) tokens", str(caught.value))[1])
    task = PasskeyTask(quick(length_min=needed, num_lengths=1), any_tokenizer, "train")
    assert {len(task.sample(index, seed=0)["input_ids"]) for index in range(50)} == {needed}
    with pytest.raises(UserError, match=f"need {needed} tokens"):
        PasskeyTask(quick(length_min=needed - 1), any_tokenizer, "train")


@pytest.mark.parametrize(
    ("changes", "limit", "message"),
    [
        ({}, 800, "data.length_max=900 exceeds the 800 tokens that the model takes"),
        ({"length_max": None}, 600, "data.length_min=700 exceeds the 600 tokens"),
        ({"length_max": None}, None, "give data.length_max"),
        ({"num_passkeys": 0}, None, "data.num_passkeys=0 must be between 1 and 99"),
        ({"num_passkeys": 100}, None, "data.num_passkeys=100 must be"),
        ({"length_max": 10**6}, None, "lower data.length_max or give a longer one"),
        ({"task": "passkeys"}, None, "data.task=passkeys: choose passkey or disk"),
    ],
)
def test_settings_that_do_not_fit_are_named_in_one_line(quick, tokenizer, changes, limit, message):
    with pytest.raises(UserError, match=message) as caught:
        make_task(quick(**changes), tokenizer, "train", limit)
    assert "\n" not in str(caught.value)


def test_another_task_is_one_class_and_one_line(quick, tokenizer, monkeypatch):
    class Other:
        def __init__(self, settings, tokenizer, split, length_limit=None):
            self.split = split

    monkeypatch.setitem(TASKS, "other", Other)
    assert make_task(quick(task="other"), tokenizer, "test").split == "test"


def test_words_and_ordinals():
    assert len(WORDS) == len(set(WORDS)) == 240
    assert all(re.fullmatch("[a-z]{3,8}", word) for word in WORDS)
    names = [ordinal(number) for number in range(1, MAX_ORDINAL + 1)]
    assert len(set(names)) == 99
    expected = {1: "first", 12: "twelfth", 20: "twentieth", 32: "thirty-second", 40: "fortieth", 99: "ninety-ninth"}
    assert {number: names[number - 1] for number in expected} == expected
