"""The Triton kernels against dense attention; `TRITON_INTERPRET=1 pytest -m gpu` runs the small ones on a CPU."""

import pytest
import torch
from torch import Tensor

from duo_id.attention.window import Window
from tests.attention.past import KV_HEADS, PATTERNS, Past

pytestmark = pytest.mark.gpu
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
WINDOWS = [(0, 1), (0, 5), (3, 8), (1, 1), (6, 1), (40, 3), (16, 64), (128, 256)]
SHAPES = [(group, 64) for group in (1, 2, 4, 7)] + [(4, dim) for dim in (16, 24, 80, 128)]
DTYPES = [torch.float32, torch.bfloat16]
shapes = pytest.mark.parametrize(("group", "dim"), SHAPES)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def decode(past: Past, stores: list[Tensor], **tuning: int) -> Tensor:
    from duo_id.attention.kernels import cached

    window = Window(past.sink, past.recent)
    given = (past.query, past.key, past.value, *stores, past.heads, past.lengths, past.arrived)
    return cached.decode(*given, window, past.scale, **tuning)


def check_decode(past: Past) -> None:
    stores = past.stores()
    past.check(decode(past, stores))
    for found, expected in zip(stores, past.stores(after=True), strict=True):
        assert torch.equal(found, expected), "the new token lies in its slot, and nothing else has changed"
    assert past.arrived.eq(0).all()


def check_stream(past: Past) -> None:
    from duo_id.attention.kernels import cached

    stores = past.stores()
    out = torch.full_like(past.query, 7)
    heads, window = past.streaming.to(torch.int32), Window(past.sink, past.recent)
    cached.stream(past.query, past.key, past.value, *stores[2:], heads, past.past[0], window, past.scale, out)
    past.check(out, heads)
    assert out.unflatten(1, (KV_HEADS, -1))[:, past.full].eq(7).all(), "heads in full are somebody else's"
    for found, expected in zip(stores, past.stores(), strict=True):
        assert torch.equal(found, expected)


@shapes
@dtypes
def test_decode(group: int, dim: int, dtype: torch.dtype) -> None:
    for lengths in ([0, 11, 300], [10, 12, 50]):
        check_decode(Past(lengths, 1, 3, 8, group=group, dim=dim, dtype=dtype, device=DEVICE))


@pytest.mark.parametrize("window", WINDOWS, ids=str)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_decode_over_any_window(window: tuple[int, int], pattern: str) -> None:
    for lengths in ([0, 1, 2], [40, 43, 44], [383, 384, 1000]):
        check_decode(Past(lengths, 1, *window, pattern=pattern, device=DEVICE, capacity=1100))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("pattern", ["mixed", "one"])
def test_decode_over_a_long_past_again_and_again(pattern: str, dtype: torch.dtype) -> None:
    """Many programs share a head, and the last adds up: the same bits each time."""
    past = Past([20_000, 13, 8191], 1, 64, 256, pattern, group=4, dim=64, dtype=dtype, device=DEVICE)
    first = decode(past, past.stores())
    past.check(first)
    for _ in range(20):
        assert torch.equal(decode(past, past.stores()), first)
        assert past.arrived.eq(0).all()


def test_decode_reads_no_free_slot() -> None:
    past = Past([5, 100, 0], 1, 3, 8, device=DEVICE, capacity=500)
    stores = [x.masked_fill(x == 7, torch.nan) for x in past.stores()]
    past.check(decode(past, stores))


def test_decode_with_no_room_left_writes_nothing() -> None:
    """As a captured step does whose cache is full."""
    past = Past([50, 20, 50], 1, 3, 8, device=DEVICE)
    full = [x[:, :, :50].contiguous() for x in past.stores()[:2]]
    guard = torch.full((2, *full[0].shape), 7, dtype=past.dtype, device=DEVICE)  # what lies behind must stay
    for place, store in zip(guard, full, strict=True):
        place.copy_(store)
    before = guard.clone()
    decode(past, [guard[0], guard[1], *past.stores()[2:]])
    changed = (guard != before).any(-1).nonzero()[:, [1, 3]].unique(dim=0).tolist()
    assert changed == [[1, 20]], "only the sample that has room"


@shapes
@dtypes
def test_stream(group: int, dim: int, dtype: torch.dtype) -> None:
    for before, new in ((0, 150), (30, 70)):
        check_stream(Past([before] * 3, new, 3, 8, group=group, dim=dim, dtype=dtype, device=DEVICE))


@pytest.mark.parametrize("window", WINDOWS, ids=str)
@pytest.mark.parametrize("pattern", ["mixed", "none"])
def test_stream_over_any_window(window: tuple[int, int], pattern: str) -> None:
    for before in (0, 1, 5, 43, 129, 383, 384, 390, 700):
        for new in (1, 7, 64, 200):
            check_stream(Past([before] * 2, new, *window, pattern=pattern, device=DEVICE))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_stream_over_a_long_chunk(dtype: torch.dtype) -> None:
    check_stream(Past([500], 5000, 128, 256, pattern="none", group=1, dim=64, dtype=dtype, device=DEVICE))


@pytest.mark.skipif(DEVICE == "cpu", reason="graphs are of CUDA")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_replay_of_a_captured_decode_step(dtype: torch.dtype) -> None:
    """Five steps, each a replay with new tokens in the old places."""
    past = Past([9, 300, 0], 1, 3, 8, dtype=dtype, device=DEVICE, capacity=400)
    stores, again = past.stores(), past.stores()
    decode(past, [x.clone() for x in stores])
    graph = torch.cuda.CUDAGraph()
    start = past.lengths.clone()
    with torch.cuda.graph(graph):
        out = decode(past, stores)
        past.lengths.add_(1)
    for step in range(5):
        for tensor in (past.query, past.key, past.value):
            tensor.normal_()
        past.lengths.copy_(start + step)
        expected = decode(past, again)
        graph.replay()
        assert torch.equal(out, expected)
        assert past.lengths.equal(start + step + 1)
    for found, wanted in zip(stores, again, strict=True):
        assert torch.equal(found, wanted)
    assert past.arrived.eq(0).all()
