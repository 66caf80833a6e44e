"""One worker for all trials of a process, and one bench for those that start processes of their own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.faults import places
from tests.faults.worker import Worker, worker

if TYPE_CHECKING:
    from tests.faults.trials import Bench


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worker]:
    """Where trials run."""
    with worker(tmp_path_factory.mktemp("worker")) as found:
        yield found


@pytest.fixture(scope="session")
def made(place: Worker, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Whole files to go on from, but those for which commands would have to run first."""
    return places.make(place, tmp_path_factory.mktemp("made") / "places", runs=False)


@pytest.fixture(scope="session")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """A folder in which trials are made, with what their commands read."""
    from tests.faults.trials import Bench

    return Bench(tmp_path_factory.mktemp("faults") / "bench")
