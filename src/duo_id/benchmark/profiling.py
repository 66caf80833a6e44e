"""Where the time of a step goes: torch.profiler's kernels (on the CPU, operators) in a few groups, and its trace."""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from duo_id.common.documents import LARGEST_ROWS, read_object

# A kernel belongs to the first group with a substring of its name.
GROUPS = {
    "streaming attention": ("streaming", "duo_id::stream", "flex"),
    "decode attention": ("_decode", "duo_id::decode"),
    "full attention": ("flash", "cudnn", "fmha", "attention", "sdpa"),
    "communication": ("nccl", "gloo", "c10d"),
    "matrix products": (
        "gemm",
        "gemv",
        "nvjet",
        "cutlass",
        "cublas",
        "aten::mm",
        "aten::bmm",
        "aten::addmm",
        "aten::linear",
    ),
    "elementwise": ("triton_", "elementwise", "reduce", "copy", "cat", "index", "aten::"),
    "other": ("",),
}
COLLECTIVES = {"all_to_all": ("sendrecv", "alltoall"), "all_gather": ("allgather",), "reduce": ("reduce",)}
PROFILED = 2  # runs that one profile takes
ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")  # categories of a trace that take a GPU's time

Event = Mapping[str, Any]  # of a trace; `ts` and `dur` in microseconds


def profile_run(
    run: Callable[[], object], device: torch.device, trace: Path | None, barrier: Callable[[], None] = lambda: None
) -> tuple[dict[str, float], dict[str, float]]:
    """Profile one run and write its trace, for chrome://tracing.

    Args:
        run: called twice, profiled once.
        device: where it runs.
        trace: the file; None: this process only runs alongside the one that writes it, and returns nothing.
        barrier: waits for the other processes of the run: a late one makes others seem busy communicating.

    Returns:
        milliseconds by group of kernels, and the result of `communication`, empty on the CPU.
    """
    cuda = device.type == "cuda"
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if cuda else [])
    with profile(activities=activities, schedule=schedule(wait=0, warmup=1, active=1)) as profiler:
        for last in (False, True):
            run()
            if cuda:
                torch.cuda.synchronize(device)
            if not last:  # starting the trace takes long and is done now
                barrier()
                profiler.step()
    if trace is None:
        return {}, {}
    profiler.export_chrome_trace(str(trace))
    if cuda:
        events = read_object(trace, LARGEST_ROWS)["traceEvents"]
        return _grouped((event["name"], event["dur"]) for event in _on_device(events)), communication(events)
    operators = (event for event in profiler.key_averages() if not event.is_user_annotation)
    return _grouped((event.key, event.self_cpu_time_total) for event in operators), {}


def communication(events: Iterable[Event]) -> dict[str, float]:
    """How long a GPU's kernels communicate, and how much of that is not hidden behind other kernels.

    Args:
        events: of a trace.

    Returns:
        milliseconds: by kind of collective, of `all` of them (overlaps count once), `exposed` while no other kernel
        runs, and of the whole `step`, from the first kernel to the last. Empty without collectives.
    """
    kernels = [event for event in _on_device(events) if event["cat"] == "kernel"]
    exchanges = [event for event in kernels if group_of(event["name"]) == "communication"]
    if not exchanges:
        return {}
    others = [event for event in kernels if group_of(event["name"]) != "communication"]
    microseconds = {
        kind: _covered([event for event in exchanges if any(sign in event["name"].lower() for sign in signs)])
        for kind, signs in COLLECTIVES.items()
    }
    microseconds |= {
        "all": _covered(exchanges),
        "exposed": _covered(kernels) - _covered(others),
        "step": max(event["ts"] + event["dur"] for event in kernels) - min(event["ts"] for event in kernels),
    }
    return {name: round(time / 1e3, 3) for name, time in microseconds.items()}


def group_of(name: str) -> str:
    """The group of a kernel or operator, by name."""
    return next(group for group, signs in GROUPS.items() if any(sign in name.lower() for sign in signs))


def _on_device(events: Iterable[Event]) -> list[Event]:
    return [event for event in events if event.get("cat") in ON_DEVICE]


def _grouped(times: Iterable[tuple[str, float]]) -> dict[str, float]:
    """Milliseconds by group, from names and microseconds."""
    spent = dict.fromkeys(GROUPS, 0.0)
    for name, time in times:
        spent[group_of(name)] += time / 1e3
    return {name: round(time, 3) for name, time in spent.items() if time}


def _covered(events: Iterable[Event]) -> float:
    """Microseconds during which at least one of the events is running."""
    covered, end = 0.0, float("-inf")
    for start, duration in sorted((event["ts"], event["dur"]) for event in events):
        covered += max(0.0, start + duration - max(start, end))
        end = max(end, start + duration)
    return covered
