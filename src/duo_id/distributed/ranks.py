"""The processes of a run: how they are started, and how they share samples and tokens."""

import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn

import lightning
import torch
import torch.distributed as dist

from duo_id.common.config import require
from duo_id.common.errors import UserError
from duo_id.common.mistakes import built


@dataclass(frozen=True)
class Ranks:
    """How many processes there are, and which one this is.

    `sequence` neighbouring ranks form a group that shares the tokens of the same samples; the groups share the
    samples of a step.

    Attributes:
        data: number of groups.
        sequence: processes of a group.
        rank: this process, from 0.
        sharded: whether each keeps its share of the model's weights alone.
        group: the processes of this one's group; None where a process is a group.
    """

    data: int = 1
    sequence: int = 1
    rank: int = 0
    sharded: bool = False
    group: dist.ProcessGroup | None = None

    @property
    def world(self) -> int:
        """Number of processes."""
        return self.data * self.sequence

    @property
    def first(self) -> bool:
        """Whether this process writes files and speaks to the user."""
        return self.rank == 0

    @property
    def data_rank(self) -> int:
        """Which group this is."""
        return self.rank // self.sequence

    @property
    def part(self) -> int:
        """Which part of its samples' tokens this process has."""
        return self.rank % self.sequence

    def tokens(self, length: int, samples: int) -> int:
        """How many tokens of a step a process computes, at most.

        Args:
            length: tokens of a sample.
            samples: of the step, of all processes together.
        """
        return -(-length // self.sequence) * -(-samples // self.data)

    def mean(self, value: torch.Tensor) -> torch.Tensor:
        """The mean of a tensor over all processes, without a gradient."""
        if self.world == 1:
            return value
        total = value.detach().float().clone()
        dist.all_reduce(total)
        return total / self.world

    def greatest(self, *values: float, device: torch.device) -> list[float]:
        """Of each number the greatest that any process has.

        Args:
            values: as many on each process.
            device: of the collective: this process's.
        """
        if self.world == 1:
            return list(values)
        found = torch.tensor(values, dtype=torch.float64, device=device)
        dist.all_reduce(found, dist.ReduceOp.MAX)
        return found.tolist()

    def barrier(self) -> None:
        """Wait until all processes are here and their devices have nothing left to do."""
        if self.world > 1:
            dist.barrier()

    def group_sum(self, value: torch.Tensor) -> torch.Tensor:
        """The sum of a tensor over the group, without a gradient."""
        if self.group is None:
            return value
        total = value.detach().clone()
        dist.all_reduce(total, group=self.group)
        return total

    def agreed(self, value: Any) -> Any:
        """The first process's value of something that each might see otherwise, such as a clock."""
        if self.world == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values)
        return values[0]

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Turn what ends a process of several into one line.

        Raises:
            ConnectionError: another process is gone.
            UserError: this one's device has not enough memory. The step cannot be left out: others wait in it.
        """
        try:
            yield
        except torch.OutOfMemoryError as error:
            if self.world == 1:
                raise
            raise UserError(
                f"process {self.rank} of {self.world} ran out of its device's memory: step.memory=least, fewer tokens, "
                "more trainer.devices or step.sequence_parallel need less"
            ) from error
        except RuntimeError as error:
            if self.world == 1 or not (isinstance(error, dist.DistError) or "gloo" in str(error)):
                raise
            raise ConnectionError("another process of this run has ended or does not answer") from error


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
    require(
        trainer.get("strategy", "auto") in ("auto", "ddp"),
        f"trainer.strategy={trainer.get('strategy')}: auto alone works; step.shard and step.sequence_parallel say how "
        "devices share the work",
    )
    about = "devices" if trainer.get("accelerator", "auto") == "auto" else "accelerator"
    kept = {key: value for key, value in trainer.items() if key != "callbacks"}  # they belong to the run's own
    plan = built("trainer", kept, about=about, logger=False, enable_checkpointing=False)
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
    require(
        world % sequence == 0,
        f"step.sequence_parallel={sequence} does not divide the {world} processes of trainer.devices x "
        f"trainer.num_nodes: the nearest that does is step.sequence_parallel={nearest}",
    )
    groups = world // sequence
    more = -(-batch_size // groups) * groups
    fits = next((size for size in divisors if size >= sequence and batch_size % (world // size) == 0), world)
    require(
        batch_size % groups == 0,
        f"{samples}={batch_size}, the samples of a step, does not divide among {groups} groups of processes: the "
        f"nearest that work are {samples}={more} and step.sequence_parallel={fits}",
    )


def several() -> bool:
    """Whether this process is connected to others of its run."""
    return dist.is_available() and dist.is_initialized()


def leave(status: int) -> NoReturn:
    """End this process with an exit status; at once where it is one of several.

    Of several the others may wait for this one in a collective, and what NCCL does at exit would wait for them. So
    it ends without, and whoever started the processes ends the others.
    """
    if several():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def _end_with(parent: int) -> None:
    """End this process when the one that started it is gone: it would wait for it in a collective."""
    while os.getppid() == parent:
        time.sleep(2)
    sys.stderr.write("the process that started this one is gone\n")
    os.kill(os.getpid(), signal.SIGKILL)
