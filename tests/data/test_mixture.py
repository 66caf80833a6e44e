import pickle
from collections import Counter

import pytest
import torch

from duo_id.common.errors import UserError
from duo_id.data.registry import DRAFTED, make_task


@pytest.fixture
def mixture(quick, tokenizer):
    """A mixture with these weights."""

    def make(weights, split="train", **changes):
        return make_task(quick(task="mixture", mixture=weights, **changes), tokenizer, split)

    return make


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        ({"text": 1.0}, "ttttt"),
        ({"passkey": 1.0, "text": 1.0}, "ptptptpt"),
        ({"text": 1.0, "passkey": 1.0}, "tptptptp"),
        ({"text": 2.0, "passkey": 1.0}, "tpttpttpt"),
        ({"passkey": 1.0, "text": 2.0}, "tpttpttpt"),
        ({"passkey": 1.0, "copying": 1.0, "text": 2.0}, "tpcttpct"),
        ({"passkey": 0.1, "copying": 0.0, "text": 0.3}, "tptttptttp"),
        ({"passkey": 0.1, "copying": 0.4, "text": 0.1}, "cpcctccpcc"),  # a tie that sums of floats would miss
    ],
)
def test_the_task_that_lacks_most_comes_next(mixture, weights, expected):
    task = mixture(weights)
    assert "".join(task.task_of(index)[0] for index in range(len(expected))) == expected


WEIGHTS = [
    {"passkey": 1.0, "key_value": 1.0, "copying": 1.0, "multi_query": 1.0, "text": 1.0},
    {"passkey": 0.1, "key_value": 0.2, "text": 0.7},
    {"copying": 5.0, "text": 0.3},
    {"text": 1e-3, "multi_query": 3.0, "key_value": 2.0, "copying": 0.0},
]


@pytest.mark.parametrize("weights", WEIGHTS)
def test_every_prefix_has_the_weights_counts(mixture, weights):
    task, counts, total = mixture(weights), Counter(), sum(weights.values())
    for index in range(300):
        counts[task.task_of(index)] += 1
        assert all(abs(counts[name] - (index + 1) * weight / total) < 1 for name, weight in weights.items())
    assert counts.keys() <= {name for name, weight in weights.items() if weight}


def test_which_task_it_is_does_not_depend_on_what_was_asked_before(mixture):
    first, second = mixture(WEIGHTS[1]), mixture(WEIGHTS[1])
    order = [first.task_of(index) for index in range(50)]
    assert [second.task_of(index) for index in (49, 0, 17, 49, 3)] == [order[index] for index in (49, 0, 17, 49, 3)]


@pytest.mark.parametrize("split", ["train", "validation"])
def test_samples_are_those_of_the_tasks(mixture, quick, tokenizer, split):
    settings = {"curriculum": 8, "num_lengths": 3}
    task = mixture(WEIGHTS[0], split, **settings)
    alone = {name: make_task(quick(task=name, **settings), tokenizer, split) for name in DRAFTED}
    for index in range(10):
        sample, expected = task.sample(index, seed=4), alone[task.task_of(index)].sample(index, seed=4)
        assert all(torch.equal(sample[key], expected[key]) for key in ("input_ids", "labels", "answers"))


def test_haystack_is_opened_once(mixture):
    assert len({id(task.haystack) for task in mixture(WEIGHTS[0]).tasks.values()}) == 1


def test_mixture_can_be_sent_to_workers(mixture):
    task = mixture(WEIGHTS[1])
    copy = pickle.loads(pickle.dumps(task))
    assert torch.equal(copy.sample(5, 0)["input_ids"], task.sample(5, 0)["input_ids"])


def test_tasks_without_weight_are_not_made(mixture):
    changes = {"score": "all"}  # which text refuses
    with pytest.raises(UserError, match=r"data.score=all.* data.mixture.text=0"):
        mixture({"passkey": 1.0, "text": 1.0}, **changes)
    assert mixture({"passkey": 1.0, "text": 0.0}, **changes).tasks.keys() == {"passkey"}


@pytest.mark.parametrize("name", ["mixture", "disk", "nosuch"])
def test_what_cannot_be_mixed_is_refused(mixture, name):
    for weight in (1.0, 0.0):
        with pytest.raises(
            UserError, match=f"data.mixture.{name}: .* passkey, key_value, copying, multi_query, text, turns, self$"
        ):
            mixture({"passkey": 1.0, name: weight})


@pytest.mark.parametrize("weight", [-1.0, float("nan"), float("inf")])
def test_weights_are_positive_numbers(mixture, weight):
    with pytest.raises(UserError, match=r"data.mixture.text="):
        mixture({"passkey": 1.0, "text": weight})


@pytest.mark.parametrize("weights", [{}, {"text": 0.0}])
def test_a_mixture_of_nothing_is_refused(mixture, weights):
    with pytest.raises(UserError, match="data=mixture needs a task with a positive weight"):
        mixture(weights)


def test_tasks_that_do_not_fit_are_named(mixture):
    with pytest.raises(UserError, match="is too short for 6 facts"):
        mixture({"passkey": 1.0, "multi_query": 1.0}, length_min=350, num_passkeys=1)
