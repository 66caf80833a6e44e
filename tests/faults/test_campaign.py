"""The campaign itself: what it draws, what its trials find, and the long one."""

from itertools import islice
from pathlib import Path

import pytest

from tests.faults import kills
from tests.faults.__main__ import KINDS, drawn, tables
from tests.faults.cases import CASES, Case
from tests.faults.trials import FINDINGS, Bench, unreadable


def test_a_campaign_is_a_function_of_its_seed() -> None:
    first, again, other = (list(islice(drawn(seed, list(KINDS), list(CASES)), 500)) for seed in (0, 0, 1))
    assert first == again != other
    assert {(kind, name) for kind, name, _ in first} >= {("kills", name) for name in CASES}
    assert len({seed for *_, seed in first + other}) == 1000


def careless(run: str) -> None:
    """Writes a file in two parts, and believes whatever is there."""
    path = Path(run, "result.json")
    path.parent.mkdir(exist_ok=True)
    if not path.exists():
        path.write_text("[1,")
        with path.open("a") as file:
            file.write("2]")
    print("done")


def test_a_careless_command_is_found_out(bench: Bench) -> None:
    case = Case("careless", careless, ("{folder}/run",), lambda run: (run / "result.json").read_text())
    trials = [kills.trial(bench, case, seed, timed=False) for seed in range(6)]
    found = {finding for trial in trials for finding, _ in trial.found}
    assert {"silent", "unequal"} <= found <= set(FINDINGS)
    by_kind, by_command, by_fault = tables(trials)
    assert by_kind.row_count == by_command.row_count == 1
    assert list(by_fault.columns[0].cells) == sorted({name for trial in trials for name in trial.faults})


def test_half_files_are_not_read(tmp_path: Path) -> None:
    for name, text in {"a.json": "{", "b.json": "{}", "c.jsonl": "{}\n{", ".d.json": "{", "e.html": "<html>"}.items():
        (tmp_path / name).write_text(text)
    assert [line.partition(":")[0] for line in unreadable(tmp_path)] == ["a.json", "e.html"]


@pytest.mark.slow
def test_the_long_campaign_finds_nothing(bench: Bench) -> None:
    found = {}
    for kind, name, seed in islice(drawn(0, list(KINDS), list(CASES)), 200):
        trial = KINDS[kind](bench, name, seed)
        found |= {trial.name: (trial.told, trial.found)} if trial.found else {}
    assert not found
