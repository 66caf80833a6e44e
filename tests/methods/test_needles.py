"""Needles: answers located in their contexts."""

import pytest
import torch
from torch import Tensor

from duo_id.common.errors import UserError
from duo_id.data.samples import Sample
from duo_id.methods.needles import needles
from tests.methods.conftest import haystack


def sample(ids: list[int], answers: list[int]) -> Sample:
    return Sample(input_ids=torch.tensor(ids), labels=torch.tensor(ids), answers=torch.tensor(answers))


def listed(spans: list[tuple[Tensor, Tensor]]) -> list[tuple[list[int], list[int]]]:
    return [(answer.tolist(), source.tolist()) for answer, source in spans]


def test_each_answer_in_turn_with_its_source() -> None:
    spans = needles(haystack(80, (30, 60, 4), (10, 70, 3), (50, 76, 1)))
    assert listed(spans) == [
        ([60, 61, 62, 63], [30, 31, 32, 33]),
        ([70, 71, 72], [10, 11, 12]),
        ([76], haystack_place(76)),
    ]


def haystack_place(asked: int) -> list[int]:
    ids = haystack(80, (30, 60, 4), (10, 70, 3), (50, 76, 1))["input_ids"].tolist()
    return [ids.index(ids[asked])]


def test_the_first_of_several_occurrences_counts_and_all_tokens_must_agree() -> None:
    assert listed(needles(sample([5, 6, 9, 5, 7, 5, 7, 1, 5, 7], [0] * 8 + [1, 1]))) == [([8, 9], [3, 4])]


def test_an_occurrence_may_end_right_before_the_answer_but_not_overlap_it() -> None:
    assert listed(needles(sample([1, 5, 6, 5, 6], [0, 0, 0, 1, 1]))) == [([3, 4], [1, 2])]
    with pytest.raises(UserError, match="occur in their contexts"):
        needles(sample([1, 5, 5, 5], [0, 0, 1, 1]))
    assert listed(needles(sample([5, 6, 5, 6], [0, 0, 1, 1]))) == [([2, 3], [0, 1])]


@pytest.mark.parametrize(
    ("ids", "answers", "message"),
    [
        ([1, 2, 3, 4, 9], [0, 0, 0, 0, 1], r"answers occur in their contexts, such as data=passkey"),
        ([7, 7, 7], [0, 1, 1], r"answers occur in their contexts, such as data=passkey"),
        ([7, 7], [1, 1], r"answers occur in their contexts, such as data=passkey"),
        ([1, 2, 3], [0, 0, 0], r"samples with answers, such as data=passkey"),
        ([4, 5, 4, 9], [0, 0, 1, 2], r"answers occur in their contexts"),
    ],
)
def test_refusals(ids: list[int], answers: list[int], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        needles(sample(ids, answers))
    assert "\n" not in str(error.value)
