"""The machine's ceilings: bandwidth of reading or copying, and arithmetic of a large matrix product."""

from dataclasses import dataclass

import torch

from duo_id.benchmark.timing import time_runs

BUFFER_BYTES = {"cuda": 4 * 2**30, "cpu": 2**25}  # of one of the two buffers: far beyond any cache of a GPU
MATRIX = {"cuda": 8192, "cpu": 512}  # rows and columns


@dataclass(frozen=True)
class Ceilings:
    """Peak rates, from which floors are computed.

    Attributes:
        bandwidth: bytes per second to and from the device's memory: of reading, or of copying where that is faster.
        flops: floating-point operations per second of a product of two square matrices of random numbers.
    """

    bandwidth: float
    flops: float


def measure_ceilings(device: torch.device, dtype: torch.dtype, repeats: int = 10) -> Ceilings:
    """Measure both; the best run counts.

    Decode steps read far more than they write, and GPUs read faster than they copy: measured against a copy they come
    out below their floors.

    Args:
        device: the device.
        dtype: of the matrices, the model's.
        repeats: measured runs.
    """
    size = BUFFER_BYTES[device.type]
    if device.type == "cuda":
        size = min(size, torch.cuda.mem_get_info(device)[0] // 4)
    buffers = torch.empty(2, size, dtype=torch.uint8, device=device).random_()  # zeros can copy faster than real data
    numbers = buffers[0][: size - size % 4].view(torch.int32)
    read = time_runs(numbers.amax, device, repeats, warmup=3)
    copy = time_runs(lambda: buffers[0].copy_(buffers[1]), device, repeats, warmup=3)
    bandwidth = max(numbers.nbytes / min(read.runs), 2 * size / min(copy.runs))
    rows = MATRIX[device.type]
    left, right, product = torch.randn(3, rows, rows, device=device, dtype=dtype)
    multiply = time_runs(lambda: torch.mm(left, right, out=product), device, repeats, warmup=3)
    return Ceilings(bandwidth, 2 * rows**3 / min(multiply.runs))
