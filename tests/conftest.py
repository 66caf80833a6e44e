"""What all tests share.

Modules are imported by the fixtures that need them: the process that hands out tests to others reads this file too, and
would let them wait for ten seconds.
"""

from __future__ import annotations

import gc
import os
import signal
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from duo_id.train.gate_training import GateTraining

os.environ.setdefault("OMP_NUM_THREADS", "1")
if threading.current_thread() is threading.main_thread():
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup, processes that tests start would not be hung up


gc.disable()  # until all tests are collected: what is made till then stays


# Files that take longest, first to be handed out: one of them at the end would leave all other processes idle.
LONGEST = (
    "docs/test_commands deploy/test_exact step/test_compiled test_packaging test_notebooks train/test_resume "
    "scale/test_run train/test_sweeps evaluate/test_run train/test_run scale/test_steps scale/test_benchmark "
    "faults/test_kills faults/test_disks faults/test_together benchmark/test_run common/test_config "
    "attention/kernels/test_interpreted attention/test_last_layer common/test_foreign train/test_settings "
    "common/test_command_help data/test_synthetic deploy/test_cache methods/test_candidates common/test_hostile_data "
    "attention/test_backends common/test_mistakes methods/test_search common/test_cli common/test_stopping "
    "benchmark/test_train_step attention/test_functions common/test_integrity methods/test_sample_scores"
).split()


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Order files, and let garbage be collected, but not looked for in what was imported.

    A benchmark collects garbage before each measurement, and would look through all modules and all tests each time.
    """
    places = {Path(__file__).parent / f"{name}.py": place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path, len(places)))
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="session", autouse=True)
def releases() -> None:
    """What .ci/releases.py says it tests is what is imported here, or every test fails."""
    for release in os.environ.get("DUO_ID_RELEASES", "").split():
        name, _, version = release.partition("==")
        module = import_module(name.replace("-", "_"))
        assert module.__version__ == version, (
            f"{release} is to be tested, not {module.__version__} in {module.__file__}"
        )


@pytest.fixture(scope="session", autouse=True)
def ctrl_c() -> None:
    """Ctrl-C means something, also where the tests are a background job of a shell, which ignores it."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def signals() -> None:
    """Nobody listens to a signal when a test begins, whatever the shell or an earlier test has left."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
            signal.signal(number, signal.SIG_DFL)


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Tiny models gain nothing by a second thread, and wait for it long where cores are busy."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture
def make_model() -> Callable[..., PreTrainedModel]:
    """The factory of tiny random models."""
    from tests.support.tiny import tiny_model

    return tiny_model


@pytest.fixture
def gate_training() -> Callable[..., AbstractContextManager[GateTraining]]:
    """Makes a `GateTraining` of a tiny model, attached while the block lasts."""
    from tests.support.tiny import tiny_training

    return tiny_training
