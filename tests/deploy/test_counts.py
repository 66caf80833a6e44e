"""Counts of a cache that ran steps of which the host knows nothing, as compiled and captured ones are."""

import pytest
import torch
from torch import Tensor

from duo_id.common.errors import UserError
from duo_id.deploy import counts as module
from duo_id.deploy.counts import Tokens


def counted(monkeypatch: pytest.MonkeyPatch, blind: list[Tensor | None]) -> Tokens:
    """Four columns that the host sees, the first of the second sample padding, and single ones that it does not."""
    tokens = Tokens(static=True)
    tokens.start(2, torch.device("cpu"))
    tokens.mask = torch.tensor([[1, 1, 1, 1], [0, 1, 1, 1]])
    tokens.advance(4, 20)
    monkeypatch.setattr(module, "_host_blind", lambda tensor: True)
    for mask in blind:
        tokens.mask = mask
        tokens.advance(1, 20)
    monkeypatch.undo()
    return tokens


def test_steps_that_the_host_did_not_see_count(monkeypatch: pytest.MonkeyPatch) -> None:
    padding = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 1, 1, 1, 1, 0]])
    tokens = counted(monkeypatch, [None, padding])
    assert tokens.held == [6, 4]
    whole = torch.cat([padding, torch.ones(2, 2, dtype=torch.long)], 1)
    tokens.mask = whole
    tokens.advance(2, 20)
    assert tokens.held == [8, 6]
    assert tokens.past == [6, 4]


@pytest.mark.parametrize(
    "wrong",
    [
        [[1, 1, 1, 1, 1, 1], [0, 1, 1, 1, 1, 1]],  # shows the padding of a step that was not seen
        [[1, 1, 1, 1, 1, 0], [0, 1, 1, 1, 1, 0]],  # hides a token of it
        [[1, 1, 0, 1, 1, 1], [0, 1, 1, 1, 1, 0]],  # hides a token that the host saw
        [[1, 1, 1, 1, 1, 1], [1, 1, 0, 1, 1, 0]],  # as many tokens, but others
    ],
)
def test_a_mask_of_another_past_is_refused_after_them(monkeypatch: pytest.MonkeyPatch, wrong: list[list[int]]) -> None:
    padding = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 1, 1, 1, 1, 0]])
    tokens = counted(monkeypatch, [None, padding])
    tokens.mask = torch.cat([torch.tensor(wrong), torch.ones(2, 2, dtype=torch.long)], 1)
    with pytest.raises(UserError, match="hides cached tokens"):
        tokens.advance(2, 20)
    assert tokens.held == [6, 4]
    with pytest.raises(UserError, match="hides cached tokens"):
        tokens.check_past(torch.tensor(wrong))
    tokens.check_past(padding)


@pytest.mark.parametrize("static", [False, True])
def test_a_mask_of_the_latest_part_of_the_past_is_looked_at_too(static: bool) -> None:
    tokens = Tokens(static)
    tokens.start(1, torch.device("cpu"))
    tokens.advance(6, 20)
    tokens.mask = torch.tensor([[1, 0, 1, 1, 1]])
    with pytest.raises(UserError, match="hides cached tokens"):
        tokens.advance(2, 20)
    tokens.mask = torch.tensor([[1, 1, 1, 0, 1]])
    tokens.advance(2, 20)
    assert tokens.held == [7]
