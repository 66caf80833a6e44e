"""The processes of a run: how they are started, and how they share samples and tokens."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from duo_id.common.errors import UserError


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

    def reduce_max(self, *values: float, device: torch.device) -> list[float]:
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

    def broadcast(self, value: Any) -> Any:
        """The first process's value of something that each might see otherwise, such as a clock."""
        if self.world == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values)
        return values[0]

    @contextmanager
    def one_line_errors(self) -> Iterator[None]:
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
