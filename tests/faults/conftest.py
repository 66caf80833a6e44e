"""One worker for all trials of a process."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults import places
from tests.faults.worker import Worker, worker


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worker]:
    """Where trials run."""
    with worker(tmp_path_factory.mktemp("worker")) as found:
        yield found


@pytest.fixture(scope="session")
def made(place: Worker, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Whole files to go on from, but those for which commands would have to run first."""
    return places.make(place, tmp_path_factory.mktemp("made") / "places", runs=False)
