"""One bench for the trials of a file."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.faults.trials import Bench


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """A folder in which trials are made, with what their commands read."""
    from tests.faults.trials import Bench

    return Bench(tmp_path_factory.mktemp("faults") / "bench")
