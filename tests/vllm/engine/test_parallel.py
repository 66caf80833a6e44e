"""Tensor parallelism: the KV heads of a layer on several ranks, each with those rows of the mask."""

from pathlib import Path

import pytest
import torch

from duo_id import HeadMask, HeadSpans
from tests.vllm.engine.cases import PROMPTS, alternating, answers, load, save_tiny, says, served, some_prompts, tokens

BATCH = some_prompts(*PROMPTS)
ROWS = [[16, -1, 200, -1]] * 4  # no rank has all windows, and one of them no head of a window
HEADS = {
    "mask": (4, alternating()),
    "a window on one rank": (4, HeadSpans(torch.tensor(ROWS), 5)),
    "one head on both": (1, HeadMask(torch.tensor([[1], [0], [0], [1]]).bool(), 32, 64)),
}


@pytest.mark.parametrize(("kv_heads", "heads"), HEADS.values(), ids=HEADS)
def test_two_ranks_say_what_one_process_says(kv_heads: int, heads: HeadMask | HeadSpans, tmp_path: Path) -> None:
    model = load(save_tiny("llama", tmp_path, num_key_value_heads=kv_heads))
    expected = answers(model, heads, BATCH)
    assert expected != answers(model, None, BATCH)
    with served(tmp_path, heads, tensor_parallel_size=2) as engine:
        assert tokens(says(engine, BATCH)) == expected


@pytest.mark.parametrize(
    ("kv_heads", "ranks", "expected"),
    [(8, 1, [[0, 1, 2, 3, 4, 5, 6, 7]]), (4, 2, [[0, 1], [2, 3]]), (2, 4, [[0], [0], [1], [1]]), (1, 2, [[0], [0]])],
    ids=["one", "halves", "more ranks than heads", "one head"],
)
def test_heads_of_ranks(kv_heads: int, ranks: int, expected: list[list[int]]) -> None:
    """As vLLM's `QKVParallelLinear` deals them out."""
    from duo_id.vllm.layers import heads_of_rank

    assert [list(heads_of_rank(kv_heads, rank, ranks)) for rank in range(ranks)] == expected
