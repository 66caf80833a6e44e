"""Random orders."""

import io
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from transformers import PreTrainedModel

from duo_id.methods.random import random_scores

MakeModel = Callable[..., PreTrainedModel]
CONSOLE = Console(file=io.StringIO())
WINDOW: dict[str, Any] = {"sink_size": 3, "recent_size": 8}


def test_random_orders_are_a_function_of_their_seed() -> None:
    first = random_scores((6, 4), 5)
    assert torch.equal(random_scores((6, 4), 5), first)
    torch.testing.assert_close(first.flatten().sort().values, torch.linspace(0, 1, 24))
    orders = {tuple(random_scores((6, 4), seed).flatten().argsort().tolist()) for seed in range(20)}
    assert len(orders) == 20
    assert random_scores((1, 1), 0).tolist() == [[0]]
    assert random_scores((6, 4), 2**32 - 1).shape == (6, 4)
