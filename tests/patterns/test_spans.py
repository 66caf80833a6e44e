"""Spans hold whole numbers of tokens for the heads of gated layers, and a mask is the case of two values."""

import pytest
import torch

from duo_id import HeadMask, HeadSpans
from duo_id.common.documents import MOST_TOKENS
from duo_id.common.errors import UserError

SPANS = torch.tensor([[-1, 8], [64, 1], [5, 6]])


def test_layers_without_gates_see_everything() -> None:
    spans = HeadSpans(SPANS, 4, gated_layers=(1, 0))
    assert spans.spans.tolist() == [[-1, 8], [64, 1], [-1, -1]]
    assert spans.spans.dtype == torch.int32
    assert spans.retrieval.tolist() == [[True, False], [False, False], [True, True]]
    assert spans.gated_layers == (0, 1)


def test_spans_are_copied() -> None:
    given = SPANS.clone()
    spans = HeadSpans(given, 4)
    given[0, 1] = 9
    assert spans == HeadSpans(SPANS, 4)
    assert spans != HeadSpans(given, 4)
    assert spans != HeadSpans(SPANS, 3)
    assert spans != HeadSpans(SPANS, 4, (0, 1))


def test_a_mask_is_the_case_of_two_values() -> None:
    mask = HeadMask(torch.tensor([[True, False], [False, True]]), 4, 16)
    assert mask.spans.tolist() == [[-1, 16], [16, -1]]
    assert mask.spans.dtype == torch.int32
    assert HeadSpans(mask.spans, mask.sink_size).retrieval.tolist() == mask.retrieval.tolist()


def test_what_people_see() -> None:
    assert repr(HeadSpans(SPANS, 4, (0, 1))) == (
        "HeadSpans(3 layers x 2 KV heads, sink_size=4, 1 x all, 1 x 1, 1 x 8, 1 x 64)"
    )


@pytest.mark.parametrize(
    ("spans", "sink", "reason"),
    [
        pytest.param([[0]], 4, "the span of layer 0, KV head 0 is 0", id="zero"),
        pytest.param([[8, -2]], 4, "the span of layer 0, KV head 1 is -2", id="negative"),
        pytest.param([[MOST_TOKENS + 1]], 4, "must be from 1 .* to", id="beyond any context"),
        pytest.param([[8.0]], 4, "whole numbers of tokens, not torch.float32", id="float"),
        pytest.param([[True]], 4, "whole numbers of tokens, not torch.bool", id="a mask"),
        pytest.param([8], 4, "must have the shape", id="one dimension"),
        pytest.param([[8]], -1, "sink_size=-1", id="sink"),
    ],
)
def test_what_cannot_be_spans_is_refused(spans: object, sink: int, reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        HeadSpans(torch.tensor(spans), sink)


def test_another_shape_is_refused() -> None:
    with pytest.raises(UserError, match="for 3 layers x 2 KV heads, but tiny has 2 layers x 2 KV heads"):
        HeadSpans(SPANS, 4).check_fits(2, 2, "tiny")
