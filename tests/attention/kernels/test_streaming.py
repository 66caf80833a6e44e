"""The kernels that training streams with, against dense attention; on a CPU with `TRITON_INTERPRET=1 pytest -m gpu`."""

import pytest
import torch
from torch import Tensor

from duo_id.attention.softmax import Softmax
from duo_id.attention.streaming import spans_attention, streaming_attention
from duo_id.attention.window import Window
from tests.attention.test_backends import reference

pytestmark = pytest.mark.gpu
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
WINDOWS = [(0, 1), (0, 5), (3, 8), (1, 1), (6, 1), (40, 3), (16, 64), (5, 33), (50, 70)]
LIMITS = {torch.float32: 1e-5, torch.float16: 2e-3} | ({} if DEVICE == "cpu" else {torch.bfloat16: 1e-2})
# Triton's interpreter (3.7) multiplies bfloat16 as if it were integers.


def inputs(tokens: int, group: int, dim: int, dtype: torch.dtype, kv_heads: int = 2, batch: int = 2) -> list[Tensor]:
    """Queries, keys, values and the output's gradient, in the layout of a model: heads within tokens."""
    generator = torch.Generator().manual_seed(tokens + dim)
    heads = [group * kv_heads, kv_heads, kv_heads, group * kv_heads]
    made = [torch.randn(batch, tokens, count, dim, generator=generator, dtype=torch.float64) for count in heads]
    return [x.to(DEVICE, dtype).transpose(1, 2) for x in made]


def check(tokens: int, window: tuple[int, int], group: int, dim: int, dtype: torch.dtype = torch.float32) -> None:
    check_spans(tokens, window[0], [window[1]] * 2, group, dim, dtype)


def check_spans(
    tokens: int, sink: int, spans: list[int], group: int, dim: int, dtype: torch.dtype = torch.float32
) -> None:
    query, key, value, grad = inputs(tokens, group, dim, dtype, len(spans))
    given = [x.detach().requires_grad_() for x in (query, key, value)]
    wide = [x.detach().double().cpu().requires_grad_() for x in (query, key, value)]
    scale = 0.7 * dim**-0.5
    if tokens <= sink + max(spans) and len({*spans}) == 1:  # else full attention takes it
        from duo_id.attention.kernels.operator import stream

        out = stream(*given, torch.tensor(spans, dtype=torch.int32, device=DEVICE), sink, scale)[0]
    else:
        out = spans_attention(*given, Softmax(scale), spans, sink, "triton")
    heads = zip(wide[0].split(group, 1), wide[1].split(1, 1), wide[2].split(1, 1), spans, strict=True)
    expected = torch.cat([reference(q, k, v, scale, Window(sink, span)) for q, k, v, span in heads], 1)
    assert out.dtype == dtype
    found = torch.autograd.grad(out, given, grad)
    wanted = torch.autograd.grad(expected, wide, grad.double().cpu())
    for name, got, want in zip("output query key value".split(), (out, *found), (expected, *wanted), strict=True):
        assert got.shape == want.shape
        error = (got.detach().double().cpu() - want).norm() / want.norm().clamp(min=1)
        assert error < LIMITS[dtype], (name, tokens, sink, spans, float(error))


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many blocks over few tokens, and many parts of the sink."""
    from duo_id.attention.kernels import operator

    for name, rows, block in (("FORWARD", 32, 16), ("QUERY", 16, 32), ("KEY", 32, 16)):
        monkeypatch.setattr(operator, f"{name}_TUNING", {"rows": rows, "block": block, "warps": 4, "stages": 2})
    monkeypatch.setattr(operator, "CHUNK", 64)


@pytest.mark.parametrize("window", WINDOWS, ids=str)
@pytest.mark.parametrize("tokens", [1, 16, 33, 101])
def test_any_window_and_length(window: tuple[int, int], tokens: int, small_blocks: None) -> None:
    check(tokens, window, 3, 16)


@pytest.mark.parametrize("sink", [0, 3, 40])
@pytest.mark.parametrize("spans", [[1, 60], [8, 5, 200, 8], [33, 2, 1]], ids=str)
def test_a_span_for_each_head(spans: list[int], sink: int, small_blocks: None) -> None:
    """In one launch, some of them longer than the text."""
    for tokens in (33,) if DEVICE == "cpu" else (1, 33, 70):
        check_spans(tokens, sink, spans, 2, 16)


@pytest.mark.parametrize(("group", "dim"), [(1, 16), (2, 24), (4, 64), (7, 80), (8, 96), (4, 128), (1, 256)])
def test_any_shape(group: int, dim: int, small_blocks: None) -> None:
    check(70, (5, 20), group, dim)


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize(("group", "dim"), [(4, 128), (3, 64), (1, 96), (2, 256)])
def test_the_blocks_of_real_runs(dtype: torch.dtype, group: int, dim: int) -> None:
    check(333, (64, 130), group, dim, dtype)
    check_spans(333, 64, [130, 20, 250], group, dim, dtype)


@pytest.mark.parametrize("expanded", [False, True])
def test_any_layout(expanded: bool) -> None:
    """What arrives need not be contiguous, and a gradient may be a single number under all places."""
    query, key, value, _ = inputs(150, 2, 32, torch.float32)
    given = [torch.stack([x, x], -1)[..., 0].requires_grad_() for x in (query, key, value)]
    wide = [x.detach().double().cpu().requires_grad_() for x in (query, key, value)]
    found, wanted = (
        (out.sum() if expanded else out.square().sum(), leaves)
        for out, leaves in (
            (streaming_attention(*given, Softmax(), Window(3, 20), "triton"), given),
            (reference(*wide, None, Window(3, 20)), wide),
        )
    )
    for got, want in zip(torch.autograd.grad(*found), torch.autograd.grad(*wanted), strict=True):
        torch.testing.assert_close(got.double().cpu(), want, atol=1e-4, rtol=1e-4)


def test_padding_on_either_side(make_model) -> None:
    """Within a model, whose samples have real tokens of different numbers."""
    from duo_id.attention.blends import BLENDS
    from duo_id.attention.functions import Backends, gated_heads
    from duo_id.attention.interface import attached, bound

    model = make_model("llama").to(DEVICE)
    ids = torch.randint(3, 96, (2, 60), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    for start, end in ((0, 45), (15, 60)):
        mask = torch.zeros(2, 60, dtype=torch.bool, device=DEVICE)
        mask[0], mask[1, start:end] = True, True
        results = []
        for backend in ("blocked", "triton"):
            with attached(model) as layers:
                alpha = torch.full((3, 2), 0.3, device=DEVICE, requires_grad=True)
                backends = Backends(streaming=backend)
                gated = {
                    layer.index: gated_heads(row, Window(3, 8), BLENDS["student"], backends)
                    for layer, row in zip(layers, alpha, strict=True)
                }
                with bound(layers, gated):
                    positions = (mask.long().cumsum(-1) - 1).clamp(min=0)
                    states = model.model(ids, attention_mask=mask, position_ids=positions, use_cache=False)
                value = states.last_hidden_state[mask].square().mean()
                results.append((value.detach(), *torch.autograd.grad(value, alpha)))
        torch.testing.assert_close(results[0], results[1], atol=1e-5, rtol=1e-4)


@pytest.mark.skipif(DEVICE == "cpu", reason="takes long in the interpreter")
@pytest.mark.parametrize("dim", [64, 128])
def test_a_long_sequence(dim: int) -> None:
    """Against blocked SDPA in float32, which the CPU tests tie to the dense pattern."""
    query, key, value, grad = inputs(20_000, 4, dim, torch.bfloat16, batch=1)
    given = [x.detach().requires_grad_() for x in (query, key, value)]
    wide = [x.detach().float().requires_grad_() for x in (query, key, value)]
    out = streaming_attention(*given, Softmax(), Window(128, 256), "triton")
    expected = streaming_attention(*wide, Softmax(), Window(128, 256), "blocked")
    found, wanted = torch.autograd.grad(out, given, grad), torch.autograd.grad(expected, wide, grad.float())
    for got, want in zip((out, *found), (expected, *wanted), strict=True):
        assert (got.float() - want).norm() / want.norm() < 1e-2


@pytest.mark.skipif(DEVICE == "cpu", reason="takes long in the interpreter")
def test_spans_of_a_long_sequence() -> None:
    """Windows of thousands of tokens, values and gradients; against one span at a time."""
    query, key, value, grad = inputs(20_000, 4, 128, torch.bfloat16, 4, batch=1)
    given = [x.detach().requires_grad_() for x in (query, key, value)]
    wide = [x.detach().float().requires_grad_() for x in (query, key, value)]
    spans = [8192, 256, 1, 2048]
    out = spans_attention(*given, Softmax(), spans, 64, "triton")
    expected = spans_attention(*wide, Softmax(), spans, 64, "blocked")
    found, wanted = torch.autograd.grad(out, given, grad), torch.autograd.grad(expected, wide, grad.float())
    for got, want in zip((out, *found), (expected, *wanted), strict=True):
        assert (got.float() - want).norm() / want.norm() < 1e-2


def test_the_operators_are_what_torch_expects() -> None:
    from duo_id.attention.kernels.operator import stream

    query, key, value, _ = inputs(50, 2, 16, torch.float32)
    given = [x.detach().requires_grad_() for x in (query, key, value)]
    spans = torch.tensor([8, 20], dtype=torch.int32, device=DEVICE)
    torch.library.opcheck(stream, (*given, spans, 3, 0.25), test_utils=("test_schema", "test_faketensor"))
