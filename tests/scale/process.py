"""One of the processes of a test: `python -m tests.scale.process RANK WORLD DEVICE FOLDER DIVISION...`."""

import os
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from tests.scale.cases import everything

if __name__ == "__main__":
    rank, world, device, folder = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], Path(sys.argv[4])
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
    divisions = [
        (int(data), int(sequence), sharded == "1") for data, sequence, sharded in (x.split("x") for x in sys.argv[5:])
    ]
    everything(rank, world, divisions, device, folder)
    dist.destroy_process_group()
