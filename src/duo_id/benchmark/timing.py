"""Clocks and memory counters: medians over runs, CUDA graphs of a step, and recovery from out of memory."""

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from typing import Any, TypeVar

import torch

Result = TypeVar("Result")
OUT_OF_MEMORY = ("CUBLAS_STATUS_ALLOC_FAILED", "can't allocate memory")  # messages from other than CUDA's allocator


@dataclass(frozen=True)
class Timing:
    """Seconds of several runs of the same thing."""

    runs: tuple[float, ...]

    @property
    def median(self) -> float:
        """The median run."""
        return median(self.runs)

    def summary(self) -> dict[str, Any]:
        """Median and spread in milliseconds, as plain values."""
        return {"ms": 1e3 * self.median, "ms_min": 1e3 * min(self.runs), "ms_max": 1e3 * max(self.runs)}


class Stopwatch:
    """Seconds that a row spends in each phase, announced as each begins.

    Args:
        announce: called with the name of a phase.
    """

    def __init__(self, announce: Callable[[str], None]) -> None:
        self.announce, self.seconds = announce, dict[str, float]()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time a block; seconds add up by name."""
        self.announce(name)
        start = time.perf_counter()
        try:
            yield
        finally:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    def take(self) -> dict[str, float]:
        """The seconds since the last call, by phase."""
        taken, self.seconds = self.seconds, {}
        return {name: round(seconds, 3) for name, seconds in taken.items()}


def time_runs(
    run: Callable[[], object],
    device: torch.device,
    repeats: int,
    warmup: int = 0,
    before: Callable[[], object] = lambda: None,
) -> Timing:
    """Time several runs, on a GPU between two events of its stream.

    Args:
        run: the function to time.
        device: where it runs.
        repeats: timed runs.
        warmup: runs before them.
        before: called before each run, outside the measured time.
    """
    for _ in range(warmup):
        before()
        run()
    if device.type != "cuda":
        seconds = []
        for _ in range(repeats):
            before()
            clock = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - clock)
        return Timing(tuple(seconds))
    pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    torch.cuda.synchronize(device)
    for start, end in pairs:
        before()
        start.record()
        run()
        end.record()
    torch.cuda.synchronize(device)
    return Timing(tuple(start.elapsed_time(end) / 1e3 for start, end in pairs))


def measure_peak(run: Callable[[], Result], device: torch.device) -> tuple[Result, int | None]:
    """The result of `run`, and the peak of allocated bytes, including earlier allocations; None on the CPU."""
    if device.type != "cuda":
        return run(), None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    result = run()
    torch.cuda.synchronize(device)
    return result, torch.cuda.max_memory_allocated(device)


def none_if_out_of_memory(run: Callable[[], Result]) -> Result | None:
    """The result of `run`, or None if it ran out of memory, which is then released."""
    try:
        return run()
    except (MemoryError, RuntimeError) as error:  # torch.OutOfMemoryError is a RuntimeError
        is_out_of_memory = isinstance(error, MemoryError | torch.OutOfMemoryError)
        if not is_out_of_memory and not any(sign in str(error) for sign in OUT_OF_MEMORY):
            raise
    release()  # here, where the traceback no longer keeps allocations alive
    return None


def release() -> None:
    """Return the memory of unreferenced tensors to the device."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
