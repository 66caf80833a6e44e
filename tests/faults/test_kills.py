"""A few kills; the long campaign has many, and all commands."""

import pytest

from tests.faults import kills
from tests.faults.cases import CASES
from tests.faults.trials import Bench

# Of each seed it is known when its signals come: `python -m tests.faults --only kills/NAME/SEED` tells.
FEW = [("train", 1), ("search", 0), ("convert", 0), ("data_gen", 0), ("peers", 0), ("push", 0)]


@pytest.mark.parametrize(("name", "seed"), FEW)
def test_a_killed_command_goes_on_to_the_same_end(name: str, seed: int, bench: Bench) -> None:
    trial = kills.trial(bench, CASES[name], seed, timed=False)
    assert not trial.found, trial.told
    assert trial.struck, trial.told


def test_weights_whose_unpacking_is_killed_are_unpacked_anew(bench: Bench) -> None:
    trial = kills.trial(bench, CASES["unpack"], 0, timed=False)
    assert not trial.found, trial.told
