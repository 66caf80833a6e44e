"""Starting the processes of a run on the devices that its trainer settings name."""

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
    """Start the processes that the trainer's arguments ask for, unless torchrun or Slurm has; find this one's place.

    Args:
        trainer: settings of Lightning's Trainer.
        sequence: how many processes share the tokens of a sample.
        shard: whether they share the weights.
        batch_size: samples of a step, in all.
        samples: the override that sets this number.

    Returns:
        this process's device, and its place.

    Raises:
        UserError: so many processes cannot share the work.
    """
    check(
        trainer.get("strategy", "auto") in ("auto", "ddp"),
        f"trainer.strategy={trainer.get('strategy')}: auto alone works; step.shard and step.sequence_parallel say how "
        "devices share the work",
    )
    about = "devices" if trainer.get("accelerator", "auto") == "auto" else "accelerator"
    kept = {key: value for key, value in trainer.items() if key != "callbacks"}  # they belong to the run's own
    plan = instantiate("trainer", kept, about=about, logger=False, enable_checkpointing=False)
    target = trainer.get("_target_")
    check(isinstance(plan, lightning.Trainer), f"trainer._target_={target} is no Trainer: give lightning.Trainer")
    world = plan.world_size
    check_ranks(world, sequence, batch_size, samples)
    if world == 1:
        return plan.strategy.root_device, Ranks()
    parent = os.getppid() if "LOCAL_RANK" in os.environ and "TORCHELASTIC_RUN_ID" not in os.environ else None
    watcher = logging.getLogger("lightning.fabric.strategies.launchers.subprocess_script")
    watcher.setLevel(logging.INFO)  # says which process ended the run,
    watcher.disabled = False  # though Hydra's configuration of logging silences whatever logger was there before
    fabric = lightning.Fabric(
        accelerator=trainer.get("accelerator", "auto"),
        devices=plan.num_devices,
        num_nodes=plan.num_nodes,
        strategy="ddp",
    )
    try:
        fabric.launch()
    except ValueError as error:  # torchrun or Slurm has started another number
        raise UserError(f"trainer.devices={trainer.get('devices')}: {error}") from error
    os.environ.setdefault("LOCAL_RANK", str(fabric.local_rank))  # Slurm has another name for it
    if parent is not None and fabric.local_rank:
        threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    group = None
    if sequence > 1:
        group, _ = dist.new_subgroups(sequence)
    return fabric.device, Ranks(world // sequence, sequence, fabric.global_rank, shard, group)


def check_ranks(world: int, sequence: int, batch_size: int, samples: str = "data.batch_size") -> None:
    """Raise a `UserError`, with the nearest that works, unless `world` processes can share a step."""
    divisors = [size for size in range(1, world + 1) if world % size == 0]
    nearest = min(divisors, key=lambda size: abs(size - sequence))
    check(
        world % sequence == 0,
        f"step.sequence_parallel={sequence} does not divide the {world} processes of trainer.devices x "
        f"trainer.num_nodes: the nearest that does is step.sequence_parallel={nearest}",
    )
    groups = world // sequence
    more = -(-batch_size // groups) * groups
    fits = next((size for size in divisors if size >= sequence and batch_size % (world // size) == 0), world)
    check(
        batch_size % groups == 0,
        f"{samples}={batch_size}, the samples of a step, does not divide among {groups} groups of processes: the "
        f"nearest that work are {samples}={more} and step.sequence_parallel={fits}",
    )


def _end_with(parent: int) -> None:
    """End this process when the one that started it is gone: it would wait for it in a collective."""
    while os.getppid() == parent:
        time.sleep(2)
    sys.stderr.write("the process that started this one is gone\n")
    os.kill(os.getpid(), signal.SIGKILL)
