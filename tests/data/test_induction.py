from collections import Counter

import pytest
import torch

from duo_id.data.haystack import Haystack
from duo_id.data.induction import BEGINNING, InductionTask
from duo_id.errors import UserError
from tests.data.conftest import find


def stretches(sample, task):
    """The tokens of a sample before its questions, and the stretches that come again, with their beginnings."""
    tokens, answers = sample["input_ids"].tolist(), sample["answers"]
    found = []
    for turn in range(1, int(answers.max()) + 1):
        (places,) = torch.where(answers == turn)
        found.append(tokens[int(places[0]) - BEGINNING : int(places[-1]) + 1])
    begin = int((answers == 1).nonzero()[0]) - BEGINNING - len(task.apart)
    return tokens[:begin], found


def test_stretches_of_the_context_come_again(quick, any_tokenizer):
    task = InductionTask(quick(num_passkeys=4, answer_tokens=12), any_tokenizer, "train")
    for index in range(20):
        context, found = stretches(task.sample(index, seed=0), task)
        assert len(found) == 4
        for stretch in found:
            assert len(stretch) == BEGINNING + 12
            assert len(find(stretch, context)) == 1
            assert len(find(stretch[:BEGINNING], context)) == 1


def test_the_context_is_hay_in_random_order(quick, tokenizer):
    task = InductionTask(quick(), tokenizer, "train")
    task.hay = lambda rng, count: list(range(1000, 1000 + count))
    context, _ = stretches(task.sample(0, seed=0), task)
    assert sorted(context) == list(range(1000, 1000 + len(context)))
    moved = sum(abs(token - 1000 - place) for place, token in enumerate(context)) / len(context) ** 2
    assert 0.28 < moved < 0.39  # a third, in random order


def test_stretches_are_spread_over_the_depths_and_come_in_random_order(quick, tokenizer):
    task = InductionTask(
        quick(num_passkeys=3, length_min=2000, length_max=2000, depth_min=0.2, depth_max=0.8), tokenizer, "train"
    )
    orders = Counter()
    for index in range(60):
        context, found = stretches(task.sample(index, seed=0), task)
        depths = [find(stretch, context)[0] / len(context) for stretch in found]
        orders[tuple(sorted(range(3), key=depths.__getitem__))] += 1
        for part, depth in enumerate(sorted(depths)):
            assert 0.2 + 0.2 * part - 0.01 < depth < 0.2 + 0.2 * (part + 1) + 0.01
    assert len(orders) == 6


def test_a_haystack_of_one_token_is_refused(quick, tokenizer, make_haystack):
    haystack: Haystack = make_haystack(["aaaa " * 2000])
    with pytest.raises(UserError, match=r"so few different tokens .*data.mixture.induction=0") as caught:
        InductionTask(quick(), tokenizer, "train", haystack=haystack)
    assert "\n" not in str(caught.value)


def test_stretches_need_room(quick, tokenizer):
    with pytest.raises(UserError, match=r"data.depth_max=0.5 must exceed data.depth_min"):
        InductionTask(quick(depth_min=0.5, depth_max=0.5), tokenizer, "train")
    with pytest.raises(UserError, match=r"40 stretches with 10 .* lower data.num_passkeys or data.answer_tokens"):
        InductionTask(quick(num_passkeys=40), tokenizer, "train")
