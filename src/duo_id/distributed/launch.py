"""Launching the processes of a run on the devices in its trainer settings."""

import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Mapping
from typing import Any

import lightning
import torch
import torch.distributed as dist

from duo_id.common.errors import UserError, check
from duo_id.common.mistakes import instantiate
from duo_id.distributed.ranks import Ranks


def launch(
    trainer: Mapping[str, Any], sequence: int, shard: bool, batch_size: int, samples: str = "data.batch_size"
) -> tuple[torch.device, Ranks]:
    """Start the processes that the trainer's arguments ask for, unless torchrun or Slurm has started them.

    Args:
        trainer: settings of Lightning's Trainer.
        sequence: number of processes that share the tokens of a sample.
        shard: whether processes share the weights.
        batch_size: total number of samples of a step.
        samples: the override that sets `batch_size`.

    Returns:
        this process's device and ranks.

    Raises:
        UserError: that many processes cannot share the work.
    """
    check(
        trainer.get("strategy", "auto") in ("auto", "ddp"),
        f"trainer.strategy={trainer.get('strategy')}: only auto works; step.shard and step.sequence_parallel set how "
        "devices share the work",
    )
    setting = "devices" if trainer.get("accelerator", "auto") == "auto" else "accelerator"
    arguments = {
        key: value for key, value in trainer.items() if key != "callbacks"
    }  # these are for the run's own trainer
    planned = instantiate("trainer", arguments, default_key=setting, logger=False, enable_checkpointing=False)
    target = trainer.get("_target_")
    check(isinstance(planned, lightning.Trainer), f"trainer._target_={target} is not a Trainer: use lightning.Trainer")
    world = planned.world_size
    check_ranks(world, sequence, batch_size, samples)
    if world == 1:
        return planned.strategy.root_device, Ranks()
    parent = os.getppid() if "LOCAL_RANK" in os.environ and "TORCHELASTIC_RUN_ID" not in os.environ else None
    watcher = logging.getLogger("lightning.fabric.strategies.launchers.subprocess_script")
    watcher.setLevel(logging.INFO)  # logs which process ended the run,
    watcher.disabled = False  # although Hydra's logging configuration disables existing loggers
    fabric = lightning.Fabric(
        accelerator=trainer.get("accelerator", "auto"),
        devices=planned.num_devices,
        num_nodes=planned.num_nodes,
        strategy="ddp",
    )
    try:
        fabric.launch()
    except ValueError as error:  # torchrun or Slurm has started a different number
        raise UserError(f"trainer.devices={trainer.get('devices')}: {error}") from error
    os.environ.setdefault("LOCAL_RANK", str(fabric.local_rank))  # Slurm uses another name
    if parent is not None and fabric.local_rank:
        threading.Thread(target=_exit_with_parent, args=(parent,), daemon=True).start()
    group = None
    if sequence > 1:
        group, _ = dist.new_subgroups(sequence)
    return fabric.device, Ranks(world // sequence, sequence, fabric.global_rank, shard, group)


def check_ranks(world: int, sequence: int, batch_size: int, samples: str = "data.batch_size") -> None:
    """Raise a `UserError`, with the nearest settings that work, unless `world` processes can share a step."""
    divisors = [size for size in range(1, world + 1) if world % size == 0]
    nearest = min(divisors, key=lambda size: abs(size - sequence))
    check(
        world % sequence == 0,
        f"step.sequence_parallel={sequence} does not divide the {world} processes of trainer.devices x "
        f"trainer.num_nodes: the nearest that does is step.sequence_parallel={nearest}",
    )
    groups = world // sequence
    rounded_up = -(-batch_size // groups) * groups
    fits = next((size for size in divisors if size >= sequence and batch_size % (world // size) == 0), world)
    check(
        batch_size % groups == 0,
        f"{samples}={batch_size}, the samples of a step, is not divisible by {groups} groups of processes: the "
        f"nearest that work are {samples}={rounded_up} and step.sequence_parallel={fits}",
    )


def _exit_with_parent(parent: int) -> None:
    """End this process when its parent is gone; otherwise it would wait for it in a collective forever."""
    while os.getppid() == parent:
        time.sleep(2)
    sys.stderr.write("the parent process is gone\n")
    os.kill(os.getpid(), signal.SIGKILL)
