"""Masks, spans and patterns as what decides how far heads see."""

import pytest
import torch

from duo_id import HeadPattern, HeadSpans
from duo_id.common.errors import UserError
from duo_id.patterns.decided import decided

PATTERN = HeadPattern(torch.tensor([[0.1, 0.9], [0.8, 0.2]]), sink_size=4, recent_size=8)


def test_a_pattern_needs_a_cut_and_the_others_have_one() -> None:
    mask, spans = PATTERN.binarize(sparsity=0.5), HeadSpans(torch.tensor([[8, -1]]), 4)
    assert decided(PATTERN, 0.5) == decided(PATTERN, None, 0.5) == mask
    assert decided(mask) is mask
    assert decided(spans) is spans
    for heads in (mask, spans):
        with pytest.raises(UserError, match=f"^a {type(heads).__name__} has decided how far heads see"):
            decided(heads, 0.5)
    with pytest.raises(UserError, match=r"^a str is neither a HeadMask, nor a HeadSpans, nor a HeadPattern$"):
        decided("heads")
