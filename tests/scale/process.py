"""One of the processes of a test."""

import os
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from tests.scale.cases import everything


def take_part(rank: int, world: int, device: str, folder: Path, divisions: dict[str, tuple[str, ...]]) -> None:
    """Meet the others and compute the cases of each division."""
    torch.set_num_threads(1)
    os.environ["LOCAL_RANK"] = str(rank)
    if device == "cuda":
        torch.cuda.set_device(rank)
    dist.init_process_group(
        "nccl" if device == "cuda" else "gloo",
        init_method=f"file://{folder / 'meeting'}",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=120),
    )
    everything(rank, divisions, device, folder)
    dist.destroy_process_group()
