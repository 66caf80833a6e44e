"""Contenders: names, budgets in bytes, windows; and a pattern's window must be shorter than the contexts."""

import pytest
import torch

from duo_id.common.errors import UserError
from duo_id.evaluate.contenders import check_windows, contenders, kept_tokens
from duo_id.evaluate.items import Item, Question
from duo_id.patterns.pattern import HeadPattern
from duo_id.patterns.random_masks import random_mask

FOUND = HeadPattern(torch.tensor([[0.1, 0.9], [0.3, 0.2], [0.8, 0.4]]), sink_size=4, recent_size=16)
OTHER = HeadPattern(torch.tensor([[0.9, 0.1], [0.3, 0.2], [0.8, 0.4]]), sink_size=2, recent_size=8)
TOKENS = 1000


def test_all_contenders_are_named_once() -> None:
    lineup = contenders({"found": FOUND, "other": OTHER}, [0.25, 0.5], 2, ["streaming", "window"], 7)
    assert [contender.key for contender in lineup] == [
        ("full", "full", 0.0, None),
        *[("pattern", name, sparsity, None) for name in ("found", "other") for sparsity in (0.25, 0.5)],
        *[("baseline", "random", sparsity, seed) for sparsity in (0.25, 0.5) for seed in (7, 8)],
        *[("baseline", name, sparsity, None) for name in ("streaming", "window") for sparsity in (0.25, 0.5, 1.0)],
    ]
    masks = {contender.key: contender.mask(TOKENS) for contender in lineup}
    assert bool(masks["full", "full", 0.0, None].retrieval.all())
    assert masks["pattern", "other", 0.5, None] == OTHER.binarize(sparsity=0.5)
    assert masks["baseline", "random", 0.5, 8] == random_mask(3, 2, 0.5, 8, sink_size=4, recent_size=16)
    assert all(contender.describe()["heads"] == contender.heads for contender in lineup)


@pytest.mark.parametrize("tokens", [10, 20, 21, 1000])
@pytest.mark.parametrize("sparsity", [0.25, 0.5, 1.0])
def test_baselines_have_the_bytes_of_the_mask(sparsity: float, tokens: int) -> None:
    by_key = {
        contender.key: contender
        for contender in contenders({"found": FOUND}, [0.25, 0.5], 0, ["streaming", "window"], 0)
    }
    mask = FOUND.binarize(sparsity=sparsity)
    streaming = int((~mask.retrieval).sum())
    budget = (6 - streaming) * tokens + streaming * min(tokens, 20)
    for name, sink in (("streaming", 4), ("window", 0)):
        baseline = by_key["baseline", name, sparsity, None].mask(tokens)
        assert not baseline.retrieval.any()
        assert baseline.sink_size == sink
        tokens_kept = 6 * min(tokens, baseline.sink_size + baseline.recent_size)
        assert abs(tokens_kept - budget) <= 3, "half a token a head"


def test_layers_without_gates_are_left_alone() -> None:
    hybrid = HeadPattern(torch.rand(3, 2), 4, 16, gated_layers=(0, 2))
    for contender in contenders({"hybrid": hybrid}, [0.5], 3, ["streaming"], 0):
        mask = contender.mask(TOKENS)
        assert mask.gated_layers == (0, 2)
        assert bool(mask.retrieval[1].all())


def test_kept_tokens_by_hand() -> None:
    assert kept_tokens(0.5, 1000, 20) == 510
    assert kept_tokens(0.25, 1000, 20) == 755
    assert kept_tokens(1, 1000, 20) == 20
    assert kept_tokens(0.5, 10, 20) == 20, "a mask has room for its window"


def test_a_window_as_long_as_the_context_is_refused() -> None:
    items = [Item("t", 30, 0, (1,) * size, (Question((1,), (1,)),)) for size in (10, 20)]
    check_windows({"other": OTHER}, items)
    with pytest.raises(
        UserError, match=r"longest context has 20 tokens, which all fit in the window of found .* raise lengths"
    ):
        check_windows({"other": OTHER, "found": FOUND}, items)
