"""The Triton kernels of attention over block tables against dense attention.

`TRITON_INTERPRET=1 pytest -m gpu` runs the small tests on a CPU.
"""

from itertools import accumulate, pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from duo_id.attention.window import Window

pytestmark = pytest.mark.gpu
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LIMITS = {torch.float32: 3e-5, torch.float16: 2e-3} | ({} if DEVICE == "cpu" else {torch.bfloat16: 1e-2})
# Triton's interpreter (3.7) multiplies bfloat16 as if it were integers.
WINDOWS = {
    "usual": Window(5, 11),
    "aligned": Window(16, 32),
    "no-sink": Window(0, 6),
    "one": Window(3, 1),
    "wide": Window(20, 1000),
    "long-sink": Window(100, 9),
    "all": None,
}
BATCHES = {  # (tokens before, new tokens) of each request
    "decode": [(40, 1), (3, 1), (190, 1), (0, 1), (16, 1), (31, 1)],
    "prefill": [(0, 37), (0, 4), (0, 16)],
    "chunked": [(32, 24), (64, 2), (7, 70)],
    "mixed": [(40, 1), (16, 50), (0, 0), (170, 1), (0, 60), (15, 1)],
    "empty": [(0, 0)],
}
BATCHES["many"] = [(past % 90, 1 + 5 * (past % 3 == 0)) for past in range(140)]


class Batch:
    """A step of a batch over a cache in which whatever no query may see is NaN.

    Attributes:
        arguments: of `paged_attention`, up to `out`, with rows of padding behind.
    """

    def __init__(
        self,
        requests: list[tuple[int, int]],
        window: Window | None,
        kv_heads: int = 2,
        group: int = 3,
        dim: int = 16,
        size: int = 16,
        dtype: torch.dtype = torch.float32,
        tokens_first: bool = False,
    ) -> None:
        torch.manual_seed(len(requests) + dim)
        self.window, self.scale = window, 0.7 * dim**-0.5
        lengths = [past + new for past, new in requests]
        self.starts = [0, *accumulate(new for _, new in requests)]
        needed = [-(-length // size) for length in lengths]
        order = (torch.randperm(sum(needed)) + 1).split(needed)  # block 0 is nobody's
        table = torch.zeros(len(requests), max(needed) + 3, dtype=torch.int32)
        shape = (sum(needed) + 1, kv_heads, size, 2 * dim)
        if tokens_first:
            cache = torch.full((shape[0], size, kv_heads, 2 * dim), torch.nan, dtype=dtype).transpose(1, 2)
        else:
            cache = torch.full(shape, torch.nan, dtype=dtype)
        keys, values = ([torch.randn(length, kv_heads, dim).to(dtype) for length in lengths] for _ in range(2))
        slots = []
        for row, (past, _) in enumerate(requests):
            position = torch.arange(lengths[row])
            table[row, : needed[row]] = order[row]
            block, offset = table[row][position // size].long(), position % size
            both = torch.cat([keys[row], values[row]], -1)
            cache[block[:past], :, offset[:past]] = both[:past]
            slots.append((block * size + offset)[past:])
            if window is not None:
                for freed in range(-(-window.sink_size // size), max(0, past - window.recent_size + 1) // size):
                    cache[table[row, freed].long()] = torch.nan
                    table[row, freed] = 0
        query = torch.randn(self.starts[-1] + 2, kv_heads * group, dim).to(dtype)
        padding = torch.full((2, kv_heads, dim), torch.nan, dtype=dtype)
        self.new = [
            torch.cat([*(x[past:] for x, (past, _) in zip(parts, requests, strict=True)), padding]).to(DEVICE)
            for parts in (keys, values)
        ]
        self.keys, self.values = ([x.to(DEVICE) for x in parts] for parts in (keys, values))
        self.slots = torch.cat([*slots, torch.tensor([-1, -1])]).to(DEVICE)
        self.query, self.cache, self.table = query.to(DEVICE), cache.to(DEVICE), table.to(DEVICE)
        self.lengths = torch.tensor(lengths, dtype=torch.int32, device=DEVICE)
        self.first = torch.tensor(self.starts, dtype=torch.int32, device=DEVICE)
        self.out = torch.full_like(self.query, 7)

    def store(self) -> None:
        """Store the new tokens, and nothing else."""
        from duo_id.attention.kernels.paged import store

        before = self.cache.clone()
        store(self.cache, *self.new, self.slots)
        size = self.cache.shape[2]
        kept = self.slots[self.slots >= 0]
        before[kept // size, :, kept % size] = torch.cat(self.new, -1)[: len(kept)]
        torch.testing.assert_close(self.cache, before, rtol=0, atol=0, equal_nan=True)

    def attend(self, **options: Any) -> Tensor:
        from duo_id.attention.kernels.paged import paged_attention

        sink, recent = (self.window.sink_size, self.window.recent_size) if self.window else (0, None)
        given = (self.query, self.cache, self.table, self.first, self.lengths, self.out, self.scale, sink, recent)
        paged_attention(*given, **options)
        return self.out

    def expected(self, softcap: float | None = None) -> Tensor:
        """Attention by its definition, in float64."""
        out = torch.full_like(self.query, 7, dtype=torch.float64)
        for (start, end), keys, values in zip(pairwise(self.starts), self.keys, self.values, strict=True):
            query = self.query[start:end].double().unflatten(1, (keys.shape[1], -1))
            scores = torch.einsum("qhgd,khd->hgqk", query, keys.double()) * self.scale
            if softcap is not None:
                scores = softcap * (scores / softcap).tanh()
            position = torch.arange(len(keys), device=DEVICE)
            window = self.window or Window(0, max(1, len(keys)))
            visible = window.dense(position[len(keys) - (end - start) :], position)
            weights = scores.masked_fill(~visible, -torch.inf).softmax(-1)
            out[start:end] = torch.einsum("hgqk,khd->qhgd", weights, values.double()).flatten(1, 2)
        return out

    def check(self, softcap: float | None = None, **options: Any) -> None:
        self.store()
        found, wanted = self.attend(softcap=softcap, **options).double(), self.expected(softcap)
        error = (found - wanted).norm() / wanted.norm().clamp(min=1)
        assert error < LIMITS[self.query.dtype], (self.starts, self.window, float(error))
        assert found[self.starts[-1] :].eq(7).all(), "rows of padding are not written"


@pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES)
@pytest.mark.parametrize("window", WINDOWS.values(), ids=WINDOWS)
def test_a_step_is_attention_over_whole_contexts(window: Window | None, batch: list[tuple[int, int]]) -> None:
    """Blocks that no query sees are freed first, and what they held is NaN."""
    longest = 1 if all(new < 2 for _, new in batch) else None
    Batch(batch, window).check(longest=longest, block=16, least=1, rows=16)


@pytest.mark.parametrize("window", [Window(16, 40), None], ids=["window", "all"])
@pytest.mark.parametrize("size", [16, 32, 64, 128])
@pytest.mark.parametrize("tokens_first", [False, True], ids=["heads-first", "tokens-first"])
def test_any_block_size_and_layout(window: Window | None, size: int, tokens_first: bool) -> None:
    """Contexts end before, at and behind the edges of blocks; so do chunks and windows."""
    edges = [(size * 2 + off, 1) for off in (-2, -1, 0, 1)] + [(size - 1, size + 1), (size, size), (size + 1, 30)]
    Batch(edges, window, size=size, tokens_first=tokens_first).check(block=32, least=1, rows=32)


@pytest.mark.parametrize(("group", "dim"), [(1, 64), (4, 80), (7, 96), (4, 128), (2, 256), (2, 512), (20, 32)], ids=str)
@pytest.mark.parametrize("dtype", LIMITS, ids=str)
def test_any_shape_with_the_blocks_of_real_runs(group: int, dim: int, dtype: torch.dtype) -> None:
    for window in (Window(64, 130), None):
        for batch in (BATCHES["decode"], [(400, 1), (0, 90), (300, 33)]):
            longest = 1 if batch == BATCHES["decode"] else None
            Batch(batch, window, 1, group, dim, dtype=dtype).check(longest=longest)


@pytest.mark.parametrize("softcap", [2.0, 50.0])
def test_scores_with_a_soft_cap(softcap: float) -> None:
    for window in (Window(5, 11), None):
        Batch(BATCHES["mixed"], window, dim=64).check(softcap)


def test_programs_share_a_context_and_leave_their_workspace_as_it_was() -> None:
    """The same bits each time, whichever program comes last."""
    from duo_id.attention.kernels.paged import workspace

    space = workspace(8, 1, 3, 16, torch.device(DEVICE), programs=16)
    for window, least in ((Window(40, 200), 1), (None, 3), *([(None, 1)] if DEVICE == "cuda" else [])):
        batch = Batch([(300, 1), (0, 1), (143, 1), (144, 1)], window, kv_heads=1)
        options = {"space": space, "block": 16, "least": least, "programs": 16}
        batch.check(longest=1, **options)
        first = batch.out.clone()
        for _ in range(1 if DEVICE == "cpu" else 20):
            batch.out.zero_()
            assert torch.equal(batch.attend(longest=1, **options)[:4], first[:4])
            assert space.arrived.eq(0).all()


def test_a_request_without_tokens_is_padding() -> None:
    """Captured steps have such, also with a query of their own; they neither read nor write."""
    batch = Batch([(40, 1), (16, 1), (0, 0), (0, 0)], Window(5, 11))
    batch.lengths[1] = 0
    batch.table[1:] = 10**6
    batch.store()
    found = batch.attend(longest=1).double()
    torch.testing.assert_close(found[:1], batch.expected()[:1], rtol=1e-4, atol=1e-5)
    assert found[1:].eq(7).all()


def test_splits_fill_the_device_and_no_more() -> None:
    from duo_id.attention.kernels import paged

    device = torch.device("cpu")
    assert paged.multiprocessors(device) == 4
    assert paged.splits_of(1, 1000, 4, device) == 16
    assert paged.splits_of(1, 7, 4, device) == 7
    assert paged.splits_of(5, 1000, 4, device) == 3
    assert paged.splits_of(500, 1000, 4, device) == 1
    assert paged.splits_of(0, 1000, 4, device) == 16


@pytest.mark.skipif(DEVICE == "cpu", reason="takes long in the interpreter")
@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("size", [16, 128])
@pytest.mark.parametrize("window", [Window(64, 256), Window(128, 8192), None], ids=["short", "long", "all"])
def test_long_contexts(window: Window | None, size: int, dtype: torch.dtype) -> None:
    for batch in ([(20_000, 1)], [(33_000, 1), (5, 1), (8191, 1)], [(9000, 2048), (15_000, 1), (0, 3000)]):
        longest = max(new for _, new in batch)
        Batch(batch, window, 2, 4, 128, size, dtype).check(longest=longest)


@pytest.mark.skipif(DEVICE == "cpu", reason="graphs are of CUDA")
@pytest.mark.parametrize("window", [Window(64, 256), None], ids=["window", "all"])
@pytest.mark.parametrize("mixed", [False, True], ids=["decode", "mixed"])
def test_a_captured_step_replays_over_other_requests(mixed: bool, window: Window | None) -> None:
    """Of other lengths, over other blocks; requests that are gone are padding."""
    from duo_id.attention.kernels.paged import paged_attention, store, workspace

    steps = [[(5000, 1), (70, 1), (0, 1), (1000, 1)], [(90, 1), (8000, 1), (300, 1), (0, 0)], [(3, 1)] + [(0, 0)] * 3]
    if mixed:
        steps += [[(100, 70), (2000, 1), (0, 200), (40, 1)], [(0, 0), (64, 128), (900, 1), (0, 0)]]
    batches = [Batch(step, window, 2, 4, 64, dtype=torch.bfloat16) for step in steps]
    tokens, blocks = max(len(x.query) for x in batches), max(len(x.cache) for x in batches)
    columns = max(x.table.shape[1] for x in batches)
    query, out = (torch.zeros(tokens, 8, 64, dtype=torch.bfloat16, device=DEVICE) for _ in range(2))
    key, value = (torch.zeros(tokens, 2, 64, dtype=torch.bfloat16, device=DEVICE) for _ in range(2))
    cache = torch.zeros(blocks, 2, 16, 128, dtype=torch.bfloat16, device=DEVICE)
    table = torch.zeros(4, columns, dtype=torch.int32, device=DEVICE)
    starts, lengths = (torch.zeros(count, dtype=torch.int32, device=DEVICE) for count in (5, 4))
    slots = torch.full((tokens,), -1, device=DEVICE)
    space = workspace(4, 2, 4, 64, query.device)
    sink, recent = (window.sink_size, window.recent_size) if window else (0, None)

    def run() -> None:
        store(cache, key, value, slots)
        longest = None if mixed else 1
        paged_attention(query, cache, table, starts, lengths, out, 0.7 / 8, sink, recent, longest=longest, space=space)

    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    for batch in (*batches, *batches[::-1]):
        for held in (cache, out):
            held.fill_(torch.nan)
        table.zero_()
        slots.fill_(-1)
        for held, given in (
            (query, batch.query), (key, batch.new[0]), (value, batch.new[1]), (cache, batch.cache),
            (slots, batch.slots), (starts, batch.first), (lengths, batch.lengths),
        ):  # fmt: skip
            held[: len(given)] = given
        table[:, : batch.table.shape[1]] = batch.table
        graph.replay()
        real = batch.starts[-1]
        wanted = batch.expected()[:real]
        assert (out[:real].double() - wanted).norm() / wanted.norm() < LIMITS[torch.bfloat16]
        assert out[real:].isnan().all()
        assert space.arrived.eq(0).all()
