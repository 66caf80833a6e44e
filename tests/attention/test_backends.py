"""Full and streaming attention against a slow dense reference, in values and gradients."""

import sys

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import noop_mask

from duo_id.attention import full
from duo_id.attention.full import full_attention
from duo_id.attention.softmax import Softmax
from duo_id.attention.streaming import FLEX_BLOCK, flex_block_mask, spans_attention, streaming_attention
from duo_id.attention.window import Window
from duo_id.common.errors import UserError
from tests.support.pairs import pairwise

WINDOWS = [Window(0, 1), Window(0, 5), Window(3, 7), Window(16, 64), Window(130, 70), Window(5, 300)]
LENGTHS = [1, 2, 63, 64, 65, 200, 333, 777]


def inputs(tokens: int, heads: int, kv_heads: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    shapes = [(2, heads, tokens, 16), (2, kv_heads, tokens, 16), (2, kv_heads, tokens, 16)]
    return [torch.randn(shape, generator=generator, dtype=dtype).requires_grad_() for shape in shapes]


def reference(query: Tensor, key: Tensor, value: Tensor, scale: float | None, window: Window | None) -> Tensor:
    group, tokens = query.shape[1] // key.shape[1], query.shape[2]
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    i, j = torch.arange(tokens)[:, None], torch.arange(tokens)[None, :]
    seen = j <= i
    if window is not None:
        seen = seen & ((j < window.sink_size) | (i - j < window.recent_size))
    scores = query @ key.mT * (query.shape[-1] ** -0.5 if scale is None else scale)
    return scores.masked_fill(~seen, -torch.inf).softmax(-1) @ value


@pairwise(window=WINDOWS, tokens=LENGTHS, kv_heads=[2, 6])
def test_blocked_equals_dense(window: Window, tokens: int, kv_heads: int) -> None:
    query, key, value = inputs(tokens, 6, kv_heads)
    out = streaming_attention(query, key, value, Softmax(0.3), window, "blocked")
    expected = reference(query, key, value, 0.3, window)
    torch.testing.assert_close(out, expected)
    weights = torch.randn_like(out)
    found = torch.autograd.grad((out * weights).sum(), [query, key, value])
    torch.testing.assert_close(found, torch.autograd.grad((expected * weights).sum(), [query, key, value]))


@pytest.mark.parametrize("softmax", [Softmax(0.3), Softmax(0.3, 2.0)], ids=["plain", "softcap"])
@pytest.mark.parametrize("spans", [[5, 5], [64, 1, 7], [7, 300, 7, 1, 64, 300]], ids=str)
@pytest.mark.parametrize("tokens", [1, 65, 200])
def test_a_span_for_each_head_equals_a_head_at_a_time(spans: list[int], tokens: int, softmax: Softmax) -> None:
    """Values and gradients, and those of a few queries."""
    query, key, value = inputs(tokens, 2 * len(spans), len(spans))
    rows = torch.tensor([0, tokens // 2, tokens - 1])
    out = spans_attention(query, key, value, softmax, spans, 3)
    expected = torch.cat(
        [
            streaming_attention(
                query[:, 2 * head : 2 * head + 2], key[:, [head]], value[:, [head]], softmax, Window(3, span)
            )
            for head, span in enumerate(spans)
        ],
        1,
    )
    torch.testing.assert_close(out, expected)
    weights = torch.randn_like(out)
    found = torch.autograd.grad((out * weights).sum(), [query, key, value])
    torch.testing.assert_close(found, torch.autograd.grad((expected * weights).sum(), [query, key, value]))
    few = spans_attention(query[:, :, rows], key, value, softmax, spans, 3, rows=rows)
    torch.testing.assert_close(few, expected[:, :, rows])


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pairwise(window=WINDOWS, tokens=[64, 200, 333], kv_heads=[2, 6])
def test_flex_equals_dense(window: Window, tokens: int, kv_heads: int) -> None:
    query, key, value = inputs(tokens, 6, kv_heads, torch.float32)
    with torch.no_grad():  # FlexAttention has no backward pass on the CPU; on CUDA the gpu tests cover it
        out = streaming_attention(query, key, value, Softmax(), window, "flex")
        torch.testing.assert_close(out, reference(query, key, value, None, window), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("window", WINDOWS, ids=str)
def test_flex_block_mask_skips_only_what_nobody_sees(window: Window) -> None:
    tokens = 8 * FLEX_BLOCK
    mask = flex_block_mask(window, tokens, torch.device("cpu"))
    positions = torch.arange(tokens)
    blocks = window.dense(positions, positions).unflatten(0, (8, -1)).unflatten(2, (8, -1))
    computed = mask.to_dense()[0, 0].bool()
    assert torch.equal(computed, blocks.any(3).any(1))
    assert mask.mask_mod is not noop_mask


@pytest.mark.parametrize("kv_heads", [2, 6])
@pytest.mark.parametrize("scale", [None, 0.7])
def test_full_equals_dense(kv_heads: int, scale: float | None) -> None:
    query, key, value = inputs(77, 6, kv_heads)
    torch.testing.assert_close(
        full_attention(query, key, value, Softmax(scale)), reference(query, key, value, scale, None)
    )


def test_memory_of_blocked_is_linear() -> None:
    """What autograd keeps for 4 times the tokens is about 4 times as much, not 16."""

    def kept(tokens: int) -> int:
        total = 0

        def count(tensor: Tensor) -> Tensor:
            nonlocal total
            total += tensor.numel()
            return tensor

        query, key, value = inputs(tokens, 2, 1, torch.float32)
        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            streaming_attention(query, key, value, Softmax(), Window(16, 64), "blocked")
        return total

    assert kept(4096) < 5 * kept(1024)


def test_flash_attn_missing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"step.full_backend=flash_attn: .*not installed"):
        full_attention(*inputs(4, 2, 2), Softmax(), "flash_attn")


def test_cudnn_is_planned_for_long_contexts_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda: (9, 0))
    monkeypatch.setattr("torch.backends.cudnn.is_available", lambda: True)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    choose = full._choose.__wrapped__  # nothing of another device stays in its cache
    assert choose("auto", "cuda", torch.bfloat16, True) == "cudnn"
    assert choose("auto", "cuda", torch.bfloat16, False) == "flash"
    assert choose("auto", "cuda", torch.float32, True) == choose("auto", "cpu", torch.bfloat16, True) == "sdpa"


def test_unknown_backends_are_named() -> None:
    with pytest.raises(UserError, match=r"step.full_backend=fast"):
        full_attention(*inputs(4, 2, 2), Softmax(), "fast")
    with pytest.raises(UserError, match=r"step.streaming_backend=fast"):
        streaming_attention(*inputs(4, 2, 2), Softmax(), Window(1, 1), "fast")


def test_kernels_that_are_not_there_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "duo_id.attention.kernels.operator", None)
    with pytest.raises(UserError, match=r"^step.streaming_backend=triton: .* use blocked or auto$"):
        streaming_attention(*inputs(100, 4, 2), Softmax(), Window(3, 7), "triton")


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["blocked", "flex"])
@pytest.mark.parametrize("window", [Window(0, 64), Window(64, 256), Window(128, 256)], ids=str)
@pytest.mark.parametrize("tokens", [500, 1024, 3001])
def test_streaming_on_cuda(backend: str, window: Window, tokens: int) -> None:
    query, key, value = inputs(tokens, 6, 2)
    expected = reference(query, key, value, None, window)
    weights = torch.randn_like(expected)
    wanted = torch.autograd.grad((expected * weights).sum(), [query, key, value])
    moved = [x.detach().to("cuda", torch.bfloat16).requires_grad_() for x in (query, key, value)]
    out = streaming_attention(*moved, Softmax(), window, backend)
    found = torch.autograd.grad((out * weights.cuda()).sum(), moved)
    for got, want in zip((out, *found), (expected, *wanted), strict=True):
        assert (got.cpu().double() - want).norm() / want.norm() < 1e-2


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["auto", "sdpa", "cudnn"])
@pytest.mark.parametrize("tokens", [500, 1024, 3001])
def test_full_on_cuda(backend: str, tokens: int) -> None:
    query, key, value = inputs(tokens, 6, 2)
    expected = reference(query, key, value, None, None)
    weights = torch.randn_like(expected)
    wanted = torch.autograd.grad((expected * weights).sum(), [query, key, value])
    moved = [x.detach().to("cuda", torch.bfloat16).requires_grad_() for x in (query, key, value)]
    out = full_attention(*moved, Softmax(), backend)
    found = torch.autograd.grad((out * weights.cuda()).sum(), moved)
    for got, want in zip((out, *found), (expected, *wanted), strict=True):
        assert (got.cpu().double() - want).norm() / want.norm() < 1e-2


def test_flex_on_the_cpu_has_no_gradient_and_says_so() -> None:
    with pytest.raises(UserError, match=r"step.streaming_backend=flex .*blocked"):
        streaming_attention(*inputs(200, 2, 2, torch.float32), Softmax(), Window(1, 8), "flex")
