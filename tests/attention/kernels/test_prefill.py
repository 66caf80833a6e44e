"""The Triton kernel of streaming heads in prefill against dense attention.

`TRITON_INTERPRET=1 pytest -m gpu` runs the small tests on a CPU.
"""

import pytest
import torch

from tests.attention.past import KV_HEADS, Past

pytestmark = pytest.mark.gpu
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
WINDOWS = [(0, 1), (0, 5), (3, 8), (1, 1), (6, 1), (40, 3), (16, 64), (128, 256)]
SHAPES = [(group, 64) for group in (1, 2, 4, 7)] + [(4, dim) for dim in (16, 24, 80, 128)]
DTYPES = [torch.float32, torch.bfloat16]
shapes = pytest.mark.parametrize(("group", "dim"), SHAPES)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def check_stream(past: Past) -> None:
    from duo_id.attention.kernels.prefill import stream

    stores = past.stores()
    out = torch.full_like(past.query, 7)
    stream(past.query, past.key, past.value, *stores[2:], past.listed, past.past[0], past.sink, past.scale, out)
    past.check(out, past.streaming)
    assert out.unflatten(1, (KV_HEADS, -1))[:, past.full].eq(7).all(), "heads in full are somebody else's"
    for found, expected in zip(stores, past.stores(), strict=True):
        assert torch.equal(found, expected)


@shapes
@dtypes
def test_stream(group: int, dim: int, dtype: torch.dtype) -> None:
    for before, new in ((0, 150), (30, 70)):
        check_stream(Past([before] * 3, new, 3, 8, group=group, dim=dim, dtype=dtype, device=DEVICE))


@pytest.mark.parametrize("window", WINDOWS, ids=str)
@pytest.mark.parametrize("pattern", ["mixed", "none", "spans", "rings"])
def test_stream_over_any_window(window: tuple[int, int], pattern: str) -> None:
    for before in (0, 1, 5, 43, 129, 383, 384, 390, 700):
        for new in (1, 7, 64, 200):
            check_stream(Past([before] * 2, new, *window, pattern=pattern, device=DEVICE))


@pytest.mark.parametrize("pattern", ["spans", "rings"])
def test_stream_beyond_the_windows(pattern: str) -> None:
    """What is seen begins anywhere in a ring, and ends at its last slot or in the middle."""
    for before, new in ((43, 1), (170, 150), (500, 7)):
        check_stream(Past([before] * 2, new, 3, 8, pattern=pattern, group=1, device=DEVICE))


@pytest.mark.parametrize("pattern", ["spans", "rings"])
def test_stream_over_rings_that_still_grow(pattern: str) -> None:
    for before, new in ((0, 64), (7, 50), (60, 4)):
        check_stream(Past([before] * 2, new, 3, 8, pattern=pattern, device=DEVICE, most=64))


@pytest.mark.skipif(DEVICE == "cpu", reason="takes long in the interpreter")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_stream_over_long_rings(dtype: torch.dtype) -> None:
    for before, new in ((0, 6000), (5000, 3000), (12_000, 1000)):
        check_stream(Past([before], new, 64, 256, "long", group=1, dim=128, dtype=dtype, device=DEVICE))


@pytest.mark.skipif(DEVICE == "cpu", reason="takes long in the interpreter")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_stream_over_a_long_chunk(dtype: torch.dtype) -> None:
    check_stream(Past([500], 5000, 128, 256, pattern="none", group=1, dim=64, dtype=dtype, device=DEVICE))
