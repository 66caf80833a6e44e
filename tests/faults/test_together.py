"""Two commands at once in one folder, for most of them; the long campaign has all."""

import pytest

from tests.faults import together
from tests.faults.cases import CASES
from tests.faults.trials import Bench


@pytest.mark.parametrize("name", ["search", "convert", "data_gen", "peers", "unpack"])
def test_of_two_at_once_one_works_and_the_other_is_told(name: str, bench: Bench) -> None:
    trial = together.trial(bench, CASES[name], 0)
    assert not trial.found, trial.told


def test_two_that_go_on_with_one_run(bench: Bench) -> None:
    trial = together.trial(bench, CASES["search"], 4)
    assert not trial.found, trial.told
    assert trial.told[0].startswith("after SIGKILL"), "choose another seed"
