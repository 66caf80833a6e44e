"""What the machine can do at best: bytes a second of a large copy, and arithmetic of a large matrix product."""

from dataclasses import dataclass

import torch

from duo_id.benchmark.timing import timed

COPY_BYTES = {"cuda": 4 * 2**30, "cpu": 2**25}  # of one of the two buffers: far beyond any cache of a GPU
MATRIX = {"cuda": 8192, "cpu": 512}  # rows and columns


@dataclass(frozen=True)
class Ceilings:
    """Rates that floors are computed from.

    Attributes:
        bandwidth: bytes a second that a copy within the device's memory reads and writes.
        flops: floating-point operations a second of a product of two square matrices of random numbers.
    """

    bandwidth: float
    flops: float


def measure_ceilings(device: torch.device, dtype: torch.dtype, repeats: int = 10) -> Ceilings:
    """Measure both; the best run counts.

    Args:
        device: which device.
        dtype: the model's, in which matrices are multiplied.
        repeats: measured runs.
    """
    size = COPY_BYTES[device.type]
    if device.type == "cuda":
        size = min(size, torch.cuda.mem_get_info(device)[0] // 4)
    buffers = torch.empty(2, size, dtype=torch.uint8, device=device).random_()  # zeros can move faster than real data
    copy = timed(lambda: buffers[0].copy_(buffers[1]), device, repeats, warmup=3)
    rows = MATRIX[device.type]
    left, right, product = torch.randn(3, rows, rows, device=device, dtype=dtype)
    multiply = timed(lambda: torch.mm(left, right, out=product), device, repeats, warmup=3)
    return Ceilings(2 * size / min(copy.runs), 2 * rows**3 / min(multiply.runs))
