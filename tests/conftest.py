"""What all tests share.

Modules are imported by the fixtures that need them: the process that hands out tests to others reads this file too, and
would let them wait for ten seconds.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from duo_id.training import GateTraining

os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Tiny models gain nothing by a second thread, and wait for it long where cores are busy."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture
def make_model() -> Callable[..., PreTrainedModel]:
    """The factory of tiny random models."""
    from tests.tiny import tiny_model

    return tiny_model


@pytest.fixture
def gate_training() -> Callable[..., AbstractContextManager[GateTraining]]:
    """Makes a `GateTraining` of a tiny model, attached while the block lasts."""
    from tests.tiny import tiny_training

    return tiny_training
