"""Soft caps and learned sinks against a dense reference in float64, in values and gradients."""

import pytest
import torch
from torch import Tensor

from duo_id.attention.blends import BLENDS
from duo_id.attention.decode import decode_attention
from duo_id.attention.full import full_attention
from duo_id.attention.functions import Backends, gated_heads, masked_heads, masked_rows
from duo_id.attention.softmax import ROWS, Softmax, attend_by_rows
from duo_id.attention.streaming import streaming_attention
from duo_id.attention.window import Window
from tests.attention.past import Past
from tests.attention.test_backends import inputs

WINDOWS = [None, Window(0, 1), Window(0, 40), Window(3, 7), Window(130, 70)]
HEADS, KV_HEADS = 6, 2
SINKS = torch.linspace(-1, 2, HEADS, dtype=torch.float64)  # each head's its own
KINDS = {"cap": Softmax(0.6, 1.5), "sinks": Softmax(None, None, SINKS), "both": Softmax(0.6, 1.5, SINKS)}


def dense(query: Tensor, key: Tensor, value: Tensor, softmax: Softmax, seen: Tensor) -> Tensor:
    """The queries are those of the last tokens; `seen` (heads, tokens, tokens) bool."""
    group, tokens = query.shape[1] // key.shape[1], key.shape[2]
    scores = query @ key.repeat_interleave(group, 1).mT * (softmax.scale or query.shape[-1] ** -0.5)
    if softmax.softcap is not None:
        scores = softmax.softcap * torch.tanh(scores / softmax.softcap)
    shares = scores.exp() * seen[:, tokens - query.shape[2] :]
    sink = 0 if softmax.sinks is None else softmax.sinks.to(shares.dtype).exp()[:, None, None]
    return shares / (shares.sum(-1, keepdim=True) + sink) @ value.repeat_interleave(group, 1)


def seen_by(window: Window | None, tokens: int) -> Tensor:
    i, j = torch.arange(tokens)[:, None], torch.arange(tokens)[None, :]
    return (j <= i) if window is None else (j <= i) & ((j < window.sink_size) | (i - j < window.recent_size))


def same(found: Tensor, expected: Tensor, sources: list[Tensor]) -> None:
    torch.testing.assert_close(found, expected)
    weights = torch.randn(found.shape, dtype=found.dtype, generator=torch.Generator().manual_seed(1))
    grads = [torch.autograd.grad((out * weights).sum(), sources) for out in (found, expected)]
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("window", WINDOWS, ids=str)
@pytest.mark.parametrize("tokens", [5, ROWS, 2 * ROWS + 9])
def test_capped_and_sinking_attention_equals_dense(kind: str, window: Window | None, tokens: int) -> None:
    sources, softmax = inputs(tokens, HEADS, KV_HEADS), KINDS[kind]
    expected = dense(*sources, softmax, seen_by(window, tokens).expand(HEADS, -1, -1))
    if window is None:
        found = full_attention(*sources, softmax, "sdpa")
    else:
        found = streaming_attention(*sources, softmax, window)
    same(found, expected, sources)


@pytest.mark.parametrize("window", [None, Window(3, 7)], ids=str)
def test_queries_with_a_past(window: Window | None) -> None:
    query, key, value = inputs(200, HEADS, KV_HEADS)
    expected = dense(query, key, value, KINDS["both"], seen_by(window, 200).expand(HEADS, -1, -1))
    for count in (1, 60, ROWS + 1):
        found = attend_by_rows(query[:, :, -count:], key, value, KINDS["both"], window)
        torch.testing.assert_close(found, expected[:, :, -count:])


@pytest.mark.parametrize("kind", KINDS)
def test_gated_and_masked_heads_keep_them(kind: str) -> None:
    sources, window, softmax = inputs(70, HEADS, KV_HEADS), Window(2, 9), KINDS[kind]
    full, near = (dense(*sources, softmax, seen_by(w, 70).expand(HEADS, -1, -1)) for w in (None, window))
    alpha = torch.tensor([0.3, 0.9], requires_grad=True)
    gate = alpha.repeat_interleave(HEADS // KV_HEADS)[:, None, None]
    blended = gated_heads(alpha, window, BLENDS["student"], Backends())(*sources, softmax)
    same(blended, gate * full + (1 - gate) * near, [*sources, alpha])

    retrieval = torch.tensor([False, True])
    rows = retrieval.repeat_interleave(HEADS // KV_HEADS)[:, None, None]
    expected = torch.where(rows, full, near)
    spans = torch.where(retrieval, -1, window.recent_size)
    torch.testing.assert_close(masked_heads(spans, window.sink_size, Backends())(*sources, softmax), expected)
    of_rows = torch.stack([retrieval, ~retrieval])
    expected = torch.stack([expected[0], torch.where(rows, near, full)[1]])
    torch.testing.assert_close(masked_rows(of_rows, window, Backends())(*sources, softmax), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_weights_with_a_sink_add_up_to_less_than_one(kind: str) -> None:
    query, key, _ = inputs(20, HEADS, KV_HEADS)
    total = KINDS[kind].weights(query, key, seen_by(None, 20)).sum(-1)
    if KINDS[kind].sinks is None:
        torch.testing.assert_close(total, torch.ones_like(total))
    else:
        assert (total < 1).all()


def test_memory_is_that_of_some_rows() -> None:
    """What autograd keeps does not grow with the square of the tokens."""

    def kept(tokens: int) -> int:
        total = 0

        def count(tensor: Tensor) -> Tensor:
            nonlocal total
            total += tensor.numel()
            return tensor

        query, key, value = inputs(tokens, 2, 1, torch.float32)
        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            streaming_attention(query, key, value, Softmax(None, 1.5), Window(16, 64))
        return total

    assert kept(4 * ROWS * 4) < 5 * kept(4 * ROWS)


@pytest.mark.parametrize("pattern", ["mixed", "spans"])
@pytest.mark.parametrize("past", [[0], [5, 40, 3]])
def test_a_decode_step_keeps_them(past: list[int], pattern: str) -> None:
    step = Past(past, 1, sink=3, recent=7, group=3, pattern=pattern)
    sinks = torch.linspace(-1, 2, step.query.shape[1])
    found = decode_attention(
        step.query, step.key, step.value, *(stores := step.stores()),
        step.retrieval, step.listed, step.lengths, step.arrived, step.spans, step.slots, step.sink, step.scale,
        1.5, sinks,
    )  # fmt: skip
    for sample, count in enumerate(past):
        tokens = count + 1
        seen = torch.stack([
            seen_by(Window(step.sink, step.span[head]) if head in step.span else None, tokens)
            for head in range(step.key.shape[1])
            for _ in range(step.group)
        ])  # fmt: skip
        rows = (step.query, step.keys[:, :, :tokens], step.values[:, :, :tokens])
        expected = dense(*(x[sample : sample + 1].double() for x in rows), Softmax(step.scale, 1.5, sinks), seen)
        torch.testing.assert_close(found[sample : sample + 1].double(), expected, atol=1e-5, rtol=1e-5)
    for store, wanted in zip(stores, step.stores(after=True), strict=True):
        torch.testing.assert_close(store, wanted)
