import re
from collections import Counter

import pytest
import torch

from duo_id.data.key_value import KeyValueTask
from duo_id.data.samples import SPLITS
from duo_id.data.words import WORDS
from tests.data.conftest import find


def parts(sample, tokenizer):
    """A decoded sample: the hay, the entries [(key, value)] of the index, and the pairs that are asked for."""
    text = tokenizer.decode(sample["input_ids"], clean_up_tokenization_spaces=False)
    hay, head, rest = text.partition("\n\nHere is an index.")
    index, end, questions = rest.partition("\n\nThe index ends here. Now look entries up.\n")
    assert head
    assert end
    entries = re.findall(r"^Entry ([a-z ]+): ([a-z ]+)$", index, re.MULTILINE)
    assert len(entries) == index.count("\n") - 1  # every other line is an entry
    asked = re.findall(r"^Look up entry ([a-z ]+): ([a-z ]+)$", questions, re.MULTILINE)
    assert len(asked) == questions.count("\n")
    return hay, entries, asked


def test_keys_are_unique_and_asked_with_their_values(quick, tokenizer):
    task = KeyValueTask(quick(), tokenizer, "train")
    for index in range(30):
        _, entries, asked = parts(task.sample(index, seed=0), tokenizer)
        keys = [key for key, _ in entries]
        assert len(keys) == len(set(keys)) > 10
        assert len(asked) == len(set(asked)) == 3
        assert set(asked) <= set(entries)
        assert all(len(key.split()) == len(value.split()) == 2 for key, value in entries)


def test_keys_of_a_long_context_are_unique(quick, tokenizer):
    task = KeyValueTask(quick(length_min=6000, length_max=6000), tokenizer, "train")
    for index in range(5):  # of so many keys drawn at random three pairs would be equal
        _, entries, _ = parts(task.sample(index, seed=0), tokenizer)
        assert len({key for key, _ in entries}) == len(entries) > 180


def test_answers_are_the_values_in_the_order_asked(quick, tokenizer):
    sample = KeyValueTask(quick(), tokenizer, "train").sample(0, seed=0)
    _, _, asked = parts(sample, tokenizer)
    for turn, (_, value) in enumerate(asked, start=1):
        assert tokenizer.decode(sample["input_ids"][sample["answers"] == turn]) == f" {value}"


def test_asked_entry_has_its_tokens_in_the_index(quick, any_tokenizer):
    task = KeyValueTask(quick(answer_words=4), any_tokenizer, "train")
    sample = task.sample(0, seed=0)
    tokens, answers = sample["input_ids"].tolist(), sample["answers"]
    for turn in (1, 2, 3):
        (places,) = torch.where(answers == turn)
        start = int(places[0]) - len(task.colon) - len(task.spell(["fox"]))  # the key's last tokens at least
        assert len(find(tokens[start : int(places[-1]) + 1], tokens)) == 2


def test_entries_fill_the_context(quick, any_tokenizer):
    task = KeyValueTask(quick(), any_tokenizer, "train")
    most = len(task.entry) + len(task.colon) + 4 * task.longest_word
    for index in range(30):
        tokens = task.sample(index, seed=0)["input_ids"].tolist()
        (head,) = find(task.head, tokens)
        assert 0 <= head - len(task.start) < most


def test_questions_are_spread_over_the_index_in_random_order(quick, tokenizer):
    task = KeyValueTask(quick(length_min=2000, length_max=2000, depth_min=0.1, depth_max=0.7), tokenizer, "train")
    orders, depths = Counter(), []
    for index in range(60):
        _, entries, asked = parts(task.sample(index, seed=0), tokenizer)
        places = [entries.index(pair) for pair in asked]
        orders[tuple(sorted(range(3), key=places.__getitem__))] += 1
        depths.append([place / (len(entries) - 1) for place in sorted(places)])
    assert len(orders) == 6
    for part, of_part in enumerate(zip(*depths, strict=True)):
        assert 0.1 + 0.2 * part - 0.05 < min(of_part) < 0.1 + 0.2 * part + 0.06
        assert 0.1 + 0.2 * (part + 1) - 0.06 < max(of_part) < 0.1 + 0.2 * (part + 1) + 0.05


@pytest.mark.parametrize(("longest", "words"), [(900, 2), (6399, 2), (6401, 3), (100_000, 3)])
def test_keys_have_words_enough_for_the_longest_context(quick, tokenizer, longest, words):
    task = KeyValueTask(quick(length_max=longest), tokenizer, "train")
    assert task.key_words == words


def test_splits_share_no_words(quick, tokenizer):
    words = {}
    for split in SPLITS:
        task = KeyValueTask(quick(), tokenizer, split)
        entries = [pair for index in range(20) for pair in parts(task.sample(index, seed=0), tokenizer)[1]]
        words[split] = {word for pair in entries for text in pair for word in text.split()}
        assert len(words[split]) == 80
    assert set().union(*words.values()) == set(WORDS)
