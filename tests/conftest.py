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
    "docs/test_commands test_packaging deploy/test_exact test_notebooks scale/test_run train/test_run "
    "evaluate/test_run step/test_compiled train/test_identify common/test_foreign "
    "attention/kernels/test_interpreted train/test_resume report/test_bootstrap train/test_api "
    "deploy/test_quantised train/test_sweeps scale/test_steps common/test_record deploy/test_cache "
    "train/test_restoring attention/test_last_layer faults/test_files faults/test_commands common/test_cli "
    "scale/test_benchmark benchmark/test_run methods/test_candidates models/test_quantised deploy/test_install "
    "deploy/test_compile evaluate/test_api lm_eval/test_model evaluate/test_reading lm_eval/test_longbench "
    "docs/test_site faults/test_kills train/test_settings train/test_self common/test_config "
    "evaluate/tasks/test_registry common/test_command_help common/test_hostile_data models/test_families "
    "report/test_page report/test_figures attention/test_backends methods/test_search deploy/test_chunks "
    "deploy/test_fuzz deploy/test_writing train/test_gate_training faults/test_disks faults/test_together "
    "data/test_synthetic common/test_mistakes common/test_run_folders common/test_stopping "
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
