"""A step that is repeated, as one CUDA graph: its kernels are launched at once."""

from collections.abc import Callable

import torch


def capture_graph(step: Callable[[], object], device: torch.device) -> Callable[[], object]:
    """Capture a step, which must have run before, as a CUDA graph; on the CPU, the step itself.

    Args:
        step: never synchronises the device, and always reads and writes the same tensors.
        device: where it runs.

    Returns:
        a function that replays the graph.
    """
    if device.type != "cuda":
        return step
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        step()  # on its own stream, where libraries allocate the workspaces that the graph will use
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        step()
    return graph.replay
