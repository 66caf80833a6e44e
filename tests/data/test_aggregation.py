import re
from collections import Counter

import pytest
import torch

from duo_id.data.aggregation import OTHERS, TIMES, AggregationTask
from duo_id.data.samples import SPLITS
from duo_id.data.words import WORDS
from duo_id.errors import UserError
from tests.data.conftest import find


def parts(sample, tokenizer):
    """A decoded sample: the hay, the lines of the list, and what is answered."""
    text = tokenizer.decode(sample["input_ids"], clean_up_tokenization_spaces=False)
    hay, head, rest = text.partition("\n\nThis is what the hours brought, line by line.")
    listed, end, answered = rest.partition("\n\nThat was all. What came most often, as it came first:")
    assert head
    assert end
    lines = re.findall(r"^the ([a-z ]+)$", listed, re.MULTILINE)
    assert len(lines) == listed.count("\n") - 1  # every other line is one of the list
    return hay, lines, re.fullmatch(r" ([a-z ;]+)\.\n", answered)[1].split("; ")


def test_answers_are_the_most_frequent_lines_in_the_order_of_their_first(quick, tokenizer):
    task = AggregationTask(quick(), tokenizer, "train")
    for index in range(30):
        sample = task.sample(index, seed=0)
        _, lines, answered = parts(sample, tokenizer)
        counts = Counter(lines)
        assert {line for line, _ in counts.most_common(3)} == set(answered)
        assert answered == sorted(answered, key=lines.index)
        for place, words in enumerate(answered, start=1):
            assert tokenizer.decode(sample["input_ids"][sample["answers"] == place]) == f" {words}"


@pytest.mark.parametrize("length", [1400, 1500, 4000])
def test_frequent_lines_come_six_times_as_often(quick, tokenizer, length):
    task = AggregationTask(quick(length_min=length, length_max=length), tokenizer, "train")
    for index in range(10):
        _, lines, answered = parts(task.sample(index, seed=0), tokenizer)
        counts = Counter(lines)
        rounds = len(lines) // (3 * (TIMES + OTHERS))
        assert rounds >= 1
        assert len(counts) == 3 * (1 + OTHERS)
        for line, count in counts.items():
            times = TIMES if line in answered else 1
            assert rounds * times <= count <= (rounds + 1) * times


def test_lines_are_in_random_order_and_fill_the_context(quick, tokenizer):
    task = AggregationTask(quick(), tokenizer, "train")
    middles = []
    for index in range(40):
        hay, lines, answered = parts(task.sample(index, seed=0), tokenizer)
        assert len(hay.encode()) < len("\nthe ") + 2 * task.longest_word + 40
        middles += [place / len(lines) for place, line in enumerate(lines) if line == answered[0]]
    middle = torch.tensor(middles)
    assert 0.45 < middle.mean() < 0.55
    assert middle.min() < 0.05
    assert middle.max() > 0.95


def test_answers_have_the_tokens_of_the_list(quick, any_tokenizer):
    task = AggregationTask(quick(answer_words=4, length_min=1800), any_tokenizer, "train")
    sample = task.sample(0, seed=0)
    tokens, answers = sample["input_ids"].tolist(), sample["answers"]
    for turn in (1, 2, 3):
        answer = sample["input_ids"][answers == turn].tolist()
        *listed, asked = find(answer, tokens)
        assert asked == int((answers == turn).nonzero()[0])
        assert len(listed) >= TIMES
        assert len(find(task.item + answer, tokens)) == len(listed)


def test_splits_share_no_words(quick, tokenizer):
    words = {}
    for split in SPLITS:
        task = AggregationTask(quick(), tokenizer, split)
        lines = [line for index in range(40) for line in parts(task.sample(index, seed=0), tokenizer)[1]]
        words[split] = {word for line in lines for word in line.split()}
        assert len(words[split]) == 80
    assert set().union(*words.values()) == set(WORDS)


def test_more_lines_than_there_are_words_are_refused(quick, tokenizer):
    long = {"length_min": 9000, "length_max": 9000, "answer_words": 1}
    with pytest.raises(UserError, match=r"data.answer_words=1 makes 80 different phrases, 85 are needed") as caught:
        AggregationTask(quick(num_questions=17, **long), tokenizer, "train")
    assert "\n" not in str(caught.value)
    _, lines, answered = parts(
        AggregationTask(quick(num_questions=16, **long), tokenizer, "train").sample(0, 0), tokenizer
    )
    assert len(set(lines)) == 80
    assert len(answered) == 16
