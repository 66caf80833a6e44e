"""Priced heads compute what masked heads do, and their slopes are those of a dense mixture."""

from typing import Any

import pytest
import torch
from torch import Tensor

from duo_id.attention import priced
from duo_id.attention.functions import AttendFunction, Backends, masked_heads
from duo_id.attention.priced import priced_heads
from duo_id.attention.softmax import Softmax
from duo_id.attention.window import Window

SINK, TOKENS, GROUP = 2, 40, 2
SPANS = torch.tensor([-1, 4, 9], dtype=torch.int32)
OTHERS = torch.tensor([[16, 4, 4], [-1, 9, -1]], dtype=torch.int32)  # the second head's first one is its own


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, heads, TOKENS, 8) for heads in (GROUP * len(SPANS), len(SPANS), len(SPANS))]
    query, key, value = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return query, key, value


def dense(query: Tensor, key: Tensor, value: Tensor, spans: Tensor) -> Tensor:
    positions, parts = torch.arange(TOKENS), []
    for head, span in enumerate(spans.tolist()):
        visible = Window(SINK, TOKENS if span < 0 else span).dense(positions, positions)
        scores = query[:, GROUP * head : GROUP * (head + 1)] @ key[:, head, None].mT / 8**0.5
        parts.append(scores.masked_fill(~visible, -torch.inf).softmax(-1) @ value[:, head, None])
    return torch.cat(parts, 1)


@pytest.mark.parametrize("rows", [None, torch.tensor([39, 20, 20])], ids=["all rows", "some rows"])
def test_slopes_are_those_of_a_mixture(rows: Tensor | None) -> None:
    query, key, value = inputs()
    at = slice(None) if rows is None else rows
    shares = torch.zeros(OTHERS.shape, dtype=torch.float64, requires_grad=True)
    attend = priced_heads(SPANS, OTHERS, shares, SINK, Backends())
    found = attend(query[:, :, at], key, value, Softmax(), rows=rows)
    chosen = dense(query, key, value, SPANS)
    torch.testing.assert_close(found, chosen[:, :, at])
    direction = torch.randn(found.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (slopes,) = torch.autograd.grad((found * direction).sum(), shares)
    for number, other in enumerate(OTHERS):
        difference = (dense(query, key, value, other) - chosen)[:, :, at]
        expected = (difference * direction).sum((0, 2, 3)).view(-1, GROUP).sum(1)
        torch.testing.assert_close(slopes[number], expected)
    assert slopes[0, 1] == 0, "its own span"


def test_what_flows_through_is_the_gradient_of_the_chosen_spans_alone() -> None:
    sources = [x.requires_grad_() for x in inputs()]
    shares = torch.zeros(OTHERS.shape, dtype=torch.float64, requires_grad=True)
    found = priced_heads(SPANS, OTHERS, shares, SINK, Backends())(*sources, Softmax())
    expected = masked_heads(SPANS, SINK, Backends())(*sources, Softmax())
    for grad, reference in zip(
        torch.autograd.grad(found.square().sum(), sources),
        torch.autograd.grad(expected.square().sum(), sources),
        strict=True,
    ):
        torch.testing.assert_close(grad, reference)


def test_heads_whose_other_span_sees_the_same_are_not_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    computed = []

    def watched(spans: Tensor, *rest: Any) -> AttendFunction:
        computed.append(spans.tolist())
        return masked_heads(spans, *rest)

    monkeypatch.setattr(priced, "masked_heads", watched)
    others = torch.tensor([[TOKENS, 4, 4], [-1, 4, 9]], dtype=torch.int32)  # longer than the text, its own, another
    shares = torch.zeros(others.shape, dtype=torch.float64, requires_grad=True)
    priced_heads(SPANS, others, shares, SINK, Backends())(*inputs(), Softmax())
    assert computed == [SPANS.tolist(), [4]]
