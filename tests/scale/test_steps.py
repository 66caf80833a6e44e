"""Any division of a step among processes gives one process's loss, gradients and scores."""

import time
from dataclasses import replace
from functools import cache
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from duo_id.distributed.ranks import Ranks
from tests.scale.cases import CASES, EVERY, FEWER, measured, scores, step
from tests.scale.devices import environment
from tests.scale.process import take_part
from tests.support.processes import start

TWO = dict.fromkeys(["2x1x1", "1x2x0", "1x2x1"], EVERY)  # data x sequence x sharded
FOUR = dict.fromkeys(["4x1x0", "4x1x1", "2x2x0", "2x2x1", "1x4x1"], EVERY)


Found = tuple[dict[str, Any], str]  # what the processes found, and why it is not all


def together(world: int, divisions: dict[str, tuple[str, ...]], device: str, folder: Path) -> Found:
    """What the first of `world` processes found; one that fails ends the others, which would wait for it."""
    given = environment(device)
    started = [
        start(take_part, rank, world, device, folder, divisions, cwd=folder, file=folder / f"{rank}.txt", **given)
        for rank in range(world)
    ]
    running, end, failed = list(range(world)), time.monotonic() + 600, None
    while running and failed is None and time.monotonic() < end:
        wait([started[rank].process.sentinel for rank in running], timeout=1)
        ended = [rank for rank in running if started[rank].process.exitcode is not None]
        failed = next((rank for rank in ended if started[rank].process.exitcode), None)
        running = [rank for rank in running if rank not in ended]
    for rank in running:
        started[rank].process.kill()
    found = torch.load(folder / "found.pt") if (folder / "found.pt").exists() else {}
    if failed is None and not running:
        return found, ""
    failed = running[0] if failed is None else failed  # too slow
    status, output = started[failed].finish()
    last = (output.strip().splitlines() or [""])[-1]
    return found, f"process {failed} of {world}, status {status}: {last}\n{output[-6000:]}"


def part(found: Found, name: str) -> Any:
    assert name in found[0], found[1]
    return found[0][name]


@cache
def alone(name: str, device: str) -> Any:
    """What one process computes, uncompiled."""
    others = {"scores": scores, "measured": measured}
    return (
        others[name](Ranks(), device) if name in others else step(replace(CASES[name], compile=False), Ranks(), device)
    )


def close(found: Any, name: str, rtol: float = 1e-5, device: str = "cpu") -> None:
    expected = alone(name, device)
    if isinstance(found, Tensor):
        torch.testing.assert_close(found, expected, rtol=rtol, atol=rtol)
        return
    torch.testing.assert_close(found["loss"], expected["loss"], rtol=rtol, atol=0)
    scale = float(expected["gradient"].abs().max())
    assert scale > 1e-4, "a gradient of nothing proves nothing"
    torch.testing.assert_close(found["gradient"], expected["gradient"], rtol=rtol, atol=rtol * scale)
    if name in CASES and len(CASES[name].lengths) == 1:
        assert {*found["tokens"].tolist()} == {*expected["tokens"].tolist()} != set(), (
            "of the last MLP, where few count"
        )


def each(divisions: dict[str, tuple[str, ...]]) -> pytest.MarkDecorator:
    names = [(division, name) for division, chosen in divisions.items() for name in chosen]
    return pytest.mark.parametrize(("division", "name"), names)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Found:
    return together(2, TWO | FEWER, "cpu", tmp_path_factory.mktemp("two"))


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> Found:
    return together(4, FOUR, "cpu", tmp_path_factory.mktemp("four"))


@pytest.fixture(scope="module")
def two_gpus(tmp_path_factory: pytest.TempPathFactory) -> Found:
    return together(2, TWO, "cuda", tmp_path_factory.mktemp("gpus"))


@each(TWO | FEWER)
def test_two_processes_are_one(division: str, name: str, two: Found) -> None:
    close(part(two, f"{division}: {name}"), name)


@pytest.mark.slow
@each(FOUR)
def test_four_processes_are_one(division: str, name: str, four: Found) -> None:
    close(part(four, f"{division}: {name}"), name)


@pytest.mark.gpu
@each(TWO)
def test_two_gpus_are_one_process(division: str, name: str, two_gpus: Found) -> None:
    close(part(two_gpus, f"{division}: {name}"), name, 1e-4, "cuda")
