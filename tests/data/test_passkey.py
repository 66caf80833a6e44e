import hashlib
import re
from collections import Counter

import pytest
import torch

from duo_id.common.errors import UserError
from duo_id.data.passkey import PasskeyTask
from duo_id.data.samples import SPLITS
from duo_id.data.words import WORDS
from tests.data.conftest import find

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


@pytest.mark.parametrize("count", [0, 100])
def test_more_passkeys_than_ordinals_are_refused(quick, tokenizer, count):
    with pytest.raises(
        UserError, match=f"data.num_passkeys={count} must be {'at least 1' if count == 0 else 'between 1 and 99'}"
    ):
        PasskeyTask(quick(num_passkeys=count), tokenizer, "train")


def test_samples_are_those_of_earlier_versions(quick, tokenizer, make_haystack):
    """Patterns that were found on them can be found again; the hash was taken before other tasks were added."""
    haystack = make_haystack([f"The fox of number {n} sleeps near the old mill." for n in range(99)])
    task = PasskeyTask(quick(score="all"), tokenizer, "train", haystack=haystack)
    samples = [task.sample(index, seed) for index in range(9) for seed in (0, 5)]
    columns = b"".join(column.numpy().tobytes() for sample in samples for column in sample.values())
    assert hashlib.sha256(columns).hexdigest()[:16] == "cdd90c5d209da9bd"
