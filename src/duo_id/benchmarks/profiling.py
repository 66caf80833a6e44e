"""Where the time of a step goes: torch.profiler's kernels (on the CPU operators) in a few groups, and its trace."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

# The first group that has a part of a name gets it.
GROUPS = {
    "streaming attention": ("streaming", "duo_id::stream", "flex"),
    "full attention": ("flash", "cudnn", "fmha", "attention", "sdpa"),
    "communication": ("nccl",),
    "matrix products": ("gemm", "nvjet", "cutlass", "cublas", "aten::mm", "aten::bmm", "aten::addmm", "aten::linear"),
    "elementwise": ("triton_", "elementwise", "reduce", "copy", "cat", "index", "aten::"),
    "other": ("",),
}


def profiled(run: Callable[[], object], device: torch.device, trace: Path) -> dict[str, float]:
    """Milliseconds of one run by group of kernels; the trace, for chrome://tracing, is written to `trace`."""
    cuda = device.type == "cuda"
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if cuda else [])
    with profile(activities=activities) as profiler:
        run()
        if cuda:
            torch.cuda.synchronize(device)
    profiler.export_chrome_trace(str(trace))
    spent = dict.fromkeys(GROUPS, 0.0)
    for event in profiler.key_averages():
        on_device = event.device_type == torch.autograd.DeviceType.CUDA
        if on_device == cuda:
            time = event.self_device_time_total if cuda else event.self_cpu_time_total
            spent[group_of(event.key)] += time / 1e3
    return {name: round(time, 3) for name, time in spent.items() if time}


def group_of(name: str) -> str:
    """The group of a kernel or operator by its name."""
    return next(group for group, signs in GROUPS.items() if any(sign in name.lower() for sign in signs))
