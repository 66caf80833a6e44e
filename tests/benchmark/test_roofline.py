"""Floors against numbers worked out by hand for the tiny model."""

import pytest
import torch

from duo_id.benchmark.ceilings import Ceilings
from duo_id.benchmark.roofline import Floor, workload
from duo_id.patterns.pattern import HeadMask
from duo_id.patterns.spans import HeadSpans
from tests.benchmark.cases import layers_of
from tests.support.tiny import tiny_model

# 3 layers, hidden size 32, MLP 48, 4 query heads and 2 KV heads of 16, 96 tokens; float32
LAYER = 32 * 64 + 2 * 32 * 32 + 64 * 32 + 3 * 32 * 48
NORMS = 3 * 2 * 32 + 32
HEAD = 96 * 32
HALF = torch.tensor([[True, False]] * 3)


@pytest.mark.parametrize("tied", [False, True])
def test_parameters_are_counted_once_and_the_embedding_by_the_row(tied: bool) -> None:
    model = tiny_model("llama", tie_word_embeddings=tied)
    work = workload(model, layers_of(model))
    assert (work.linear, work.head, work.weights, work.embedding, work.itemsize) == (
        3 * LAYER,
        HEAD,
        4 * (3 * LAYER + NORMS),
        32,
        4,
    )


def test_a_decode_step_reads_the_weights_and_what_its_heads_keep() -> None:
    model = tiny_model("llama")
    work = workload(model, layers_of(model))
    weights = 3 * LAYER + HEAD + NORMS
    linear = 2 * (3 * LAYER + HEAD)
    full = work.decode(1, 100, None)
    assert full.bytes == 4 * (weights + 32 + 3 * 2 * 2 * 16 * 100)
    assert full.flops == linear + 3 * 4 * 4 * 16 * 101
    duo = work.decode(1, 100, HeadMask(HALF, 4, 8))
    assert duo.bytes == 4 * (weights + 32 + 3 * 2 * 16 * (100 + 11))  # its own key is not read from the cache
    assert duo.flops == linear + 3 * 4 * 2 * 16 * (101 + 12)
    assert work.decode(1, 5, HeadMask(HALF, 4, 8)) == work.decode(1, 5, None)
    batch = work.decode(3, 100, None)
    assert batch.bytes == 4 * (weights + 3 * 32 + 3 * 3 * 2 * 2 * 16 * 100)
    assert batch.flops == 3 * full.flops


def test_a_prefill_computes_what_causality_and_windows_leave() -> None:
    model = tiny_model("llama")
    work = workload(model, layers_of(model))
    pairs, near = 55, 1 + 2 + 8 * 3  # of 10 tokens; window 1 + 2
    linear = 2 * (10 * 3 * LAYER + HEAD)
    assert work.prefill(1, 10, 4, None).flops == linear + 3 * 4 * 4 * 16 * pairs
    duo = work.prefill(1, 10, 4, HeadMask(HALF, 1, 2))
    assert duo.flops == linear + 3 * 4 * 2 * 16 * (pairs + near)
    past = (4 + 8) + (3 + 3)  # before the second and the third chunk, of the two kinds of heads
    assert duo.bytes == 4 * (3 * (3 * LAYER + NORMS) + HEAD + 10 * 32 + 3 * 2 * 16 * past)
    assert work.prefill(1, 10, 4, HeadMask(HALF, 1, 20)).flops == work.prefill(1, 10, 10, None).flops


def test_spans_are_counted_head_by_head() -> None:
    """Two values are the mask's floor; each span counts what it covers, the longest no more than there is."""
    model = tiny_model("llama")
    work = workload(model, layers_of(model))
    mask, one = HeadMask(HALF, 4, 8), HeadSpans(torch.tensor([[-1, 8]] * 3), 4)
    assert work.decode(1, 100, one) == work.decode(1, 100, mask)
    assert work.prefill(1, 100, 30, one) == work.prefill(1, 100, 30, mask)
    spans = HeadSpans(torch.tensor([[-1, 8], [1, 20], [500, 500]]), 4)
    visible = 101 + 12 + 5 + 24 + 101 + 101
    full = work.decode(1, 100, None)
    assert full.bytes - work.decode(1, 100, spans).bytes == 4 * 2 * 16 * (6 * 101 - visible)
    assert full.flops - work.decode(1, 100, spans).flops == 4 * 2 * 16 * (6 * 101 - visible)
    pairs = {window: sum(min(i, window) for i in range(1, 11)) for window in (12, 5, 24, 10)}
    found = work.prefill(1, 10, 4, spans).flops - work.prefill(1, 10, 4, None).flops
    assert found == 4 * 2 * 16 * (pairs[5] - pairs[10])


def test_codes_are_read_in_place_of_numbers() -> None:
    """By heads that see all tokens, and only of whole groups."""
    model = tiny_model("llama")
    work = workload(model, layers_of(model))
    mask, tokens = HeadMask(HALF, 4, 8), 3 * 128 + 5
    exact, codes = (work.decode(2, tokens, mask, kv) for kv in ("exact", "k8v4"))
    each = 128 * 16 * (8 + 4) // 8 + 2 * (16 + 128) * 4  # of a group, and scale and zero of its channels and tokens
    assert exact.bytes - codes.bytes == 2 * 3 * 3 * (2 * 128 * 16 * 4 - each)
    assert exact.flops == codes.flops
    exact, codes = (work.prefill(1, 640, 256, mask, kv) for kv in ("exact", "k8v4"))
    assert exact.bytes - codes.bytes == 3 * (2 + 4) * (2 * 128 * 16 * 4 - each)


def test_the_slower_of_memory_and_arithmetic_decides() -> None:
    assert Floor(1000, 10).seconds(Ceilings(bandwidth=100.0, flops=10.0)) == 10.0
    assert Floor(1000, 1000).seconds(Ceilings(bandwidth=100.0, flops=10.0)) == 100.0
