"""How heads are divided; that the exchange itself is right is shown over real processes, in tests/scale/."""

import pytest

from duo_id.attention.ulysses import head_shares
from duo_id.common.errors import UserError


@pytest.mark.parametrize("parts", range(1, 13))
@pytest.mark.parametrize(("heads", "kv_heads"), [(12, 12), (12, 6), (12, 3), (12, 1), (32, 8), (15, 5)])
def test_shares_hold_each_head_once_and_its_kv_head(heads: int, kv_heads: int, parts: int) -> None:
    shares = head_shares(heads, kv_heads, parts)
    assert len(shares) == parts
    assert [head for share in shares for head in range(heads)[share.heads]] == list(range(heads))
    for share in shares:
        mine, keys = range(heads)[share.heads], range(kv_heads)[share.kv_heads]
        group = len(mine) // len(keys)
        assert [keys[place // group] for place in range(len(mine))] == [head * kv_heads // heads for head in mine]
        assert share.rows == len(mine) + 2 * len(keys)
    sizes = [len(range(heads)[share.heads]) for share in shares]
    assert max(sizes) - min(sizes) <= heads // kv_heads


def test_more_processes_than_heads_are_refused() -> None:
    with pytest.raises(
        UserError, match=r"^step.sequence_parallel=5: .* 4 heads .* step.sequence_parallel=4 is the most"
    ):
        head_shares(4, 2, 5)
