"""The decode step, as the CPU takes it and as the compiler sees it."""

import pytest
import torch
from torch import Tensor

from duo_id.attention.decode import attend_without_waiting, decode_attention, store_token
from duo_id.attention.softmax import Softmax
from duo_id.common.errors import UserError
from tests.attention.past import KV_HEADS, PATTERNS, Past
from tests.support.pairs import pairwise

WINDOWS = [(0, 1), (0, 5), (3, 8), (1, 1), (6, 1), (40, 3)]
LENGTHS = [[0, 0, 0], [2, 2, 2], [10, 3, 11], [12, 60, 0], [61, 43, 47]]  # around the window, and far beyond


def arguments(past: Past, stores: list[Tensor]) -> tuple:
    given = (past.query, past.key, past.value, *stores, past.retrieval, past.listed, past.lengths, past.arrived)
    return *given, past.spans, past.slots, past.sink, past.scale, None, None, past.dropped, past.places


@pairwise(pattern=PATTERNS, window=WINDOWS, lengths=LENGTHS, group=[1, 3])
def test_decode_equals_dense(window: tuple[int, int], lengths: list[int], pattern: str, group: int) -> None:
    past = Past(lengths, 1, *window, pattern=pattern, group=group, capacity=70)
    stores = past.stores()
    past.check(decode_attention(*arguments(past, stores)))
    for found, expected in zip(stores, past.stores(after=True), strict=True):
        assert torch.equal(found, expected), "the new token lies in its slot, and nothing else has changed"
    assert past.lengths.tolist() == [length + 1 for length in lengths]


@pytest.mark.parametrize("pattern", ["spans", "rings"])
def test_decode_over_rings_that_still_grow(pattern: str) -> None:
    """No sample has as many tokens as the longest windows, so these heads have fewer slots."""
    past = Past([60, 11, 0], 1, 3, 8, pattern=pattern, most=64)
    assert max(past.slots) < 3 + max(past.spans) or pattern == "spans"
    stores = past.stores()
    past.check(decode_attention(*arguments(past, stores)))
    for found, expected in zip(stores, past.stores(after=True), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("pattern", ["mixed", "all", "none", "rings"])
def test_decode_after_eviction(pattern: str) -> None:
    past = Past([60, 43, 50], 1, 3, 8, pattern=pattern, dropped=30)
    stores = past.stores()
    past.check(decode_attention(*arguments(past, stores)))
    for found, expected in zip(stores, past.stores(after=True), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("pattern", ["mixed", "all", "one"])
def test_decode_over_heads_of_unequal_lengths(pattern: str) -> None:
    for lengths in ([60, 43, 50], [40, 40, 90]):
        past = Past(lengths, 1, 3, 8, pattern=pattern, ragged=True, group=3)
        stores = past.stores()
        past.check(decode_attention(*arguments(past, stores)))
        for found, expected in zip(stores, past.stores(after=True), strict=True):
            assert torch.equal(found, expected)


@pytest.mark.parametrize("pattern", ["mixed", "all", "one"])
def test_unequal_heads_whose_lengths_only_the_device_knows(pattern: str) -> None:
    """As a GPU computes a softmax with a cap or sinks; a sample without room stays as it is."""
    for lengths, capacity in (([60, 43, 50], None), ([40, 40, 90], 91)):
        past = Past(lengths, 1, 3, 8, pattern=pattern, ragged=True, group=3, capacity=capacity)
        assert past.places is not None
        keys, values = past.stores()[:2]
        out = past.expected().float()
        out.unflatten(1, (KV_HEADS, -1))[:, past.full] = 0
        new = past.query, past.key, past.value, past.retrieval.long(), keys, values
        attend_without_waiting(*new, past.places, past.lengths, Softmax(past.scale, None, None), out)
        past.check(out)
        for found, expected in zip((keys, values), past.stores(after=True)[:2], strict=True):
            assert torch.equal(found, expected)
        before, full = keys.clone(), torch.full_like(past.lengths, max(lengths) + 2)
        attend_without_waiting(*new, past.places, full, Softmax(past.scale, None, None), out)
        assert torch.equal(keys, before)


def test_unequal_heads_without_room() -> None:
    past = Past([60, 43, 50], 1, 3, 8, pattern="all", ragged=True, capacity=60)
    with pytest.raises(UserError, match="has room for 60 tokens, not 61: use a larger max_length"):
        decode_attention(*arguments(past, past.stores()))


def test_decode_keeps_the_type() -> None:
    past = Past([10, 3], 1, 3, 8, dtype=torch.bfloat16)
    out = decode_attention(*arguments(past, past.stores()))
    assert out.dtype == torch.bfloat16
    assert out.shape == past.query.shape
    past.check(out)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_the_operator_keeps_its_word(pattern: str) -> None:
    """What it says it changes is all that it changes, and its shapes are known without running it."""
    for ragged in [False, True] if pattern in ("mixed", "all", "one") else [False]:
        past = Past([10, 3], 1, 3, 8, pattern=pattern, ragged=ragged)
        torch.library.opcheck(decode_attention, arguments(past, past.stores()))


def test_a_token_without_a_slot_changes_nothing() -> None:
    stored = torch.zeros(3, 2, 4, 5)
    store_token(stored, torch.ones(3, 2, 5), torch.tensor([3, 4, 0]))
    assert stored.any(-1).nonzero()[:, [0, 2]].unique(dim=0).tolist() == [[0, 3], [2, 0]]
