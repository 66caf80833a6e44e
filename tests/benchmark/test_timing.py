"""Medians over runs, peaks, and what happens when memory runs out."""

import weakref

import pytest
import torch

from duo_id.benchmark.timing import Stopwatch, Timing, measure_peak, none_if_out_of_memory, time_runs
from duo_id.deploy.graphs import capture_graph

CPU = torch.device("cpu")


def test_the_median_stands_beside_the_spread() -> None:
    assert Timing((0.003, 0.001, 0.002)).summary() == {"ms": 2.0, "ms_min": 1.0, "ms_max": 3.0}


def test_warm_ups_are_not_measured_and_each_run_is_prepared() -> None:
    order: list[str] = []
    timing = time_runs(lambda: order.append("run"), CPU, 2, warmup=1, before=lambda: order.append("before"))
    assert order == ["before", "run"] * 3
    assert len(timing.runs) == 2


def test_on_the_cpu_no_peak_is_counted() -> None:
    assert measure_peak(lambda: "done", CPU) == ("done", None)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
    ],
)
def test_out_of_memory_gives_back_what_was_held(error: Exception) -> None:
    references: list[weakref.ref[torch.Tensor]] = []

    def run() -> None:
        tensor = torch.ones(3)
        references.append(weakref.ref(tensor))
        raise type(error)(*error.args)

    assert none_if_out_of_memory(run) is None
    assert references[0]() is None


def test_other_errors_are_not_hidden() -> None:
    def run() -> None:
        raise RuntimeError("shapes differ")

    with pytest.raises(RuntimeError, match="shapes differ"):
        none_if_out_of_memory(run)


def test_the_stopwatch_adds_up_phases_and_announces_them() -> None:
    announced: list[str] = []
    watch = Stopwatch(announced.append)
    for name in ("fill", "measure", "fill"):
        with watch.phase(name):
            pass
    assert announced == ["fill", "measure", "fill"]
    assert watch.take().keys() == {"fill", "measure"}
    assert watch.take() == {}


@pytest.mark.gpu
def test_a_captured_step_runs_again_and_again_and_is_timed() -> None:
    device, count = torch.device("cuda"), torch.zeros((), device="cuda")
    run = capture_graph(lambda: count.add_(1), device)
    count_before = int(count)
    assert len(time_runs(run, device, 4, warmup=2).runs) == 4
    assert int(count) == count_before + 6


@pytest.mark.gpu
def test_the_peak_counts_what_was_freed_again() -> None:
    _, peak = measure_peak(lambda: torch.empty(2**24, device="cuda").sum().item(), torch.device("cuda"))
    assert peak is not None
    assert peak >= 2**26
