"""A few full and read-only disks; the long campaign has many, and all commands."""

import pytest

from tests.faults import disks
from tests.faults.cases import CASES
from tests.faults.trials import Bench

FEW = [
    ("search", 0, "limit"),
    ("search", 1, "read-only"),
    ("convert", 0, "limit"),
    ("convert", 1, "read-only"),
    ("data_gen", 0, "limit"),
    ("data_gen", 2, "read-only"),
    ("unpack", 1, "limit"),
    ("peers", 0, "limit"),
]


@pytest.mark.parametrize(("name", "seed", "fault"), FEW)
def test_what_cannot_be_written_is_told_and_done_later(name: str, seed: int, fault: str, bench: Bench) -> None:
    trial = disks.trial(bench, CASES[name], seed, fault)
    assert not trial.found, trial.told
    assert trial.struck, trial.told


def test_a_small_disk(bench: Bench) -> None:
    if not disks.mounts():
        pytest.skip("mounting a file system takes root")
    trial = disks.trial(bench, CASES["convert"], 2, "full")
    assert not trial.found, trial.told
