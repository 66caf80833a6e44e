"""The Triton kernel of decode steps against dense attention.

`TRITON_INTERPRET=1 pytest -m gpu` runs the small tests on a CPU.
"""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from tests.attention.past import PATTERNS, Past

pytestmark = pytest.mark.gpu
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
WINDOWS = [(0, 1), (0, 5), (3, 8), (1, 1), (6, 1), (40, 3), (16, 64), (128, 256)]
SHAPES = [(group, 64) for group in (1, 2, 4, 7)] + [(4, dim) for dim in (16, 24, 80, 128)]
DTYPES = [torch.float32, torch.bfloat16]
shapes = pytest.mark.parametrize(("group", "dim"), SHAPES)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def decode(past: Past, stores: list[Tensor], **tuning: int) -> Tensor:
    from duo_id.attention.kernels.decode import decode

    given = (past.query, past.key, past.value, *stores, past.retrieval, past.listed, past.lengths, past.arrived)
    return decode(*given, past.slots, past.sink, past.scale, past.dropped, past.places, **tuning)


def check_decode(past: Past, **tuning: int) -> None:
    stores = past.stores()
    past.check(decode(past, stores, **tuning))
    for found, expected in zip(stores, past.stores(after=True), strict=True):
        assert torch.equal(found, expected), "the new token lies in its slot, and nothing else has changed"
    assert past.arrived.eq(0).all()


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


@pytest.mark.parametrize("dropped", [1, 16, 37])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_decode_after_eviction(pattern: str, dropped: int) -> None:
    """Retrieval heads hold fewer tokens than the text has; with room for no more than the new one, too."""
    for lengths in ([60, 43, 44], [383, 384, 1000]):
        check_decode(Past(lengths, 1, 3, 8, pattern=pattern, device=DEVICE, dropped=dropped))


@dtypes
@pytest.mark.parametrize("pattern", ["mixed", "all", "one"])
def test_decode_over_heads_of_unequal_lengths(
    pattern: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which share their programs by their lengths, some with room for no more than the new token."""
    from duo_id.attention.kernels import decode as module

    monkeypatch.setattr(module, "multiprocessors", lambda device: 60)
    for lengths, capacity in (([60, 43, 44], None), ([383, 384, 1000], 1100), ([1, 2, 0], None)):
        past = Past(lengths, 1, 3, 8, pattern, dtype=dtype, device=DEVICE, capacity=capacity, ragged=True)
        check_decode(past, block=16)


@pytest.fixture
def short_shares(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Several programs for each ring, as for rings of thousands of slots."""
    from duo_id.attention.kernels import decode as module

    monkeypatch.setattr(module, "SHARE", (16, 48))
    module.programs_of.cache_clear()
    yield
    module.programs_of.cache_clear()


@pytest.mark.parametrize("sink", [0, 3, 16])
@pytest.mark.parametrize("pattern", ["spans", "rings", "none"])
def test_decode_over_rings_that_programs_share(pattern: str, sink: int, short_shares: None) -> None:
    """Of several sizes in one launch, some too short to be shared, some longer than the past."""
    few = [([60, 11, 0], 64), ([299, 303, 20], None)]
    for lengths, most in few if DEVICE == "cpu" else [([0, 1, 2], 64), *few, ([383, 90, 1000], None)]:
        for recent in (8, 200):
            past = Past(lengths, 1, sink, recent, pattern, device=DEVICE, capacity=1100, most=most)
            check_decode(past, block=16)


def test_shares_divide_the_machine_among_heads() -> None:
    """Two kinds of heads are divided as before; of rings, long ones are shared; heads in full are never starved."""
    from duo_id.attention.kernels.decode import programs_of

    for capacity in (1000, 100_000):
        for full, streaming, batch in ((4, 4, 1), (8, 24, 1), (1, 7, 4), (32, 0, 1), (40, 40, 8)):
            splits, share, rings = programs_of((384,) * streaming, capacity, full, batch, 132)
            assert splits == max(1, (132 - -(-batch * streaming // 4)) // (batch * full))
            assert share >= 384
    for slots, capacity, full in (((8256,) * 3 + (320,) * 3, 32_768, 2), ((2112, 1088, 320), 10_000, 5)):
        splits, share, rings = programs_of(slots, capacity, full, 1, 132)
        assert rings == sum(-(-size // share) for size in slots)
        programs = full * splits + rings - sum(size <= 512 for size in slots)
        assert 110 <= programs <= 132
        assert share <= 1.1 * max(512, capacity / splits)
    splits, share, rings = programs_of((8256,) * 2, 1_000_000, 4, 1, 132)
    assert splits >= 32
    assert share == 2048, "also where a cache with much room holds little"
    assert programs_of((8256,) * 8, 1_000_000, 0, 1, 132)[1] <= 2048


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("pattern", ["mixed", "one", "rings"])
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


@pytest.mark.skipif(DEVICE == "cpu", reason="graphs are of CUDA")
@pytest.mark.parametrize("pattern", ["mixed", "rings"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dropped", [0, 33])
def test_replay_of_a_captured_decode_step(dropped: int, dtype: torch.dtype, pattern: str, short_shares: None) -> None:
    """Five steps, each a replay with new tokens in the old places."""
    lengths = [9 + dropped, 300, 2 * dropped]
    past = Past(lengths, 1, 3, 8, pattern, dtype=dtype, device=DEVICE, capacity=400, dropped=dropped)
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


@pytest.mark.skipif(DEVICE == "cpu", reason="takes long in the interpreter")
@pytest.mark.parametrize("capacity", [40_000, 400_000])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_decode_over_long_rings(dtype: torch.dtype, capacity: int) -> None:
    """Windows of thousands of tokens at the sizes of real models, in caches with little and with much room."""
    for lengths in ([33_000], [8255, 20_000], [100, 4000]):
        past = Past(
            lengths, 1, 64, 256, "long", group=4, dim=128, dtype=dtype, device=DEVICE, capacity=capacity
        )  # fmt: skip
        first = decode(past, past.stores())
        past.check(first)
        for _ in range(20):
            assert torch.equal(decode(past, past.stores()), first)
        check_decode(past)
