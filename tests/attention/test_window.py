import pytest
import torch

from duo_id.attention.window import Window
from duo_id.common.errors import UserError


def test_pattern_by_hand() -> None:
    expected = [
        "x.......",
        "xx......",
        "xxx.....",
        "xxxx....",
        "xx.xx...",
        "xx..xx..",
        "xx...xx.",
        "xx....xx",
    ]
    positions = torch.arange(8)
    rows = ["".join("x" if seen else "." for seen in row) for row in Window(2, 2).dense(positions, positions)]
    assert rows == expected


def test_integers_and_tensors_agree() -> None:
    window = Window(3, 4)
    dense = window.dense(torch.arange(12), torch.arange(12))
    assert all(bool(window.sees(i, j)) == bool(dense[i, j]) for i in range(12) for j in range(12))


@pytest.mark.parametrize(("sink", "recent", "named"), [(-1, 4, "sink_size"), (2, 0, "recent_size")])
def test_sizes_that_mean_nothing_are_refused(sink: int, recent: int, named: str) -> None:
    with pytest.raises(UserError, match=named):
        Window(sink, recent)
