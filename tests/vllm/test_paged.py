"""Attention of streaming heads over a paged cache against attention over whole contexts, without vLLM."""

from itertools import accumulate, pairwise

import pytest
import torch
from torch import Tensor

from duo_id.attention.softmax import Softmax
from duo_id.attention.window import Window
from duo_id.vllm.paged import attend, make_plan, write

BLOCK, DIM, HEADS = 8, 16, 3
WINDOWS = {"usual": Window(5, 11), "aligned": Window(8, 8), "no-sink": Window(0, 6), "wide": Window(20, 100)}
BATCHES = {  # (tokens before, new tokens) of each request
    "decode": [(40, 1), (3, 1), (90, 1), (0, 1), (16, 1)],
    "prefill": [(0, 37), (0, 4), (0, 9)],
    "chunked": [(32, 24), (64, 2), (7, 30)],
    "mixed": [(40, 1), (16, 20), (0, 0), (70, 1), (0, 60)],
}


def expected(window: Window, softmax: Softmax, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attention (tokens, heads, dim) of the last queries over a whole context, by its definition."""
    length = len(key)
    rows = torch.arange(length - len(query), length)
    scores = torch.einsum("qhd,kd->hqk", query, key) * softmax.factor(DIM)
    if softmax.softcap is not None:
        scores = softmax.softcap * (scores / softmax.softcap).tanh()
    visible = window.sees(rows[:, None], torch.arange(length)[None])
    return scores.masked_fill(~visible, -torch.inf).softmax(-1).matmul(value).transpose(0, 1)


@pytest.mark.parametrize("softmax", [Softmax(0.3), Softmax(softcap=2.0)], ids=["plain", "softcap"])
@pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES)
@pytest.mark.parametrize("window", WINDOWS.values(), ids=WINDOWS)
def test_a_step_is_attention_over_whole_contexts(
    window: Window, batch: list[tuple[int, int]], softmax: Softmax
) -> None:
    """Blocks that no query sees are freed first: their entries in the table lead to a block of NaN."""
    torch.manual_seed(0)
    lengths = [past + new for past, new in batch]
    needed = [-(-length // BLOCK) for length in lengths]
    order = (torch.randperm(sum(needed)) + 1).split(needed)  # block 0 is nobody's
    table = torch.zeros(len(batch), max(needed) + 2, dtype=torch.long)
    cache = torch.full((sum(needed) + 1, 1, BLOCK, 2 * DIM), torch.nan)
    contexts = [(torch.randn(length, DIM), torch.randn(length, DIM)) for length in lengths]
    starts = [0, *accumulate(new for _, new in batch)]
    slots, news = [], []
    for row, ((past, _), (key, value)) in enumerate(zip(batch, contexts, strict=True)):
        table[row, : needed[row]] = order[row]
        positions = torch.arange(lengths[row])
        places = order[row][positions // BLOCK] * BLOCK + positions % BLOCK if lengths[row] else positions
        write(cache, key[:past, None], value[:past, None], places[:past])
        slots.append(places[past:])
        news.append((key[past:], value[past:]))
        sink_blocks, first = -(-window.sink_size // BLOCK), max(0, past - window.recent_size + 1) // BLOCK
        for block in range(sink_blocks, first):
            cache[table[row, block]] = torch.nan
            table[row, block] = 0
    padded = torch.cat([*slots, torch.tensor([-1, -1])])
    key, value = (torch.cat([*parts, torch.full((2, DIM), torch.nan)])[:, None] for parts in zip(*news, strict=True))
    write(cache, key, value, padded)
    query = torch.randn(starts[-1] + 2, HEADS, DIM)
    out = torch.zeros_like(query)
    attend(make_plan(window, BLOCK, starts, lengths, table), query, cache, softmax, out)
    for row, (start, end) in enumerate(pairwise(starts)):
        wanted = expected(window, softmax, query[start:end], *contexts[row])
        torch.testing.assert_close(out[start:end], wanted, rtol=1e-4, atol=1e-5)
    assert not out[starts[-1] :].any(), "rows of padding are not written"
