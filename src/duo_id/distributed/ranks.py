"""The processes of a run, and how they share samples and tokens."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from duo_id.common.errors import UserError


@dataclass(frozen=True)
class Ranks:
    """The number of processes, and which one this is.

    `sequence` consecutive ranks form a group that shares the tokens of the same samples; the groups share the samples
    of a step.

    Attributes:
        data: number of groups.
        sequence: processes per group.
        rank: this process, from 0.
        sharded: whether each process keeps only its share of the model's weights.
        group: the processes of this one's group; None if each process is its own group.
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
        """Whether this process writes files and prints."""
        return self.rank == 0

    @property
    def data_rank(self) -> int:
        """The index of this process's group."""
        return self.rank // self.sequence

    @property
    def part(self) -> int:
        """The index of the part of its samples' tokens that this process has."""
        return self.rank % self.sequence

    def tokens(self, length: int, samples: int) -> int:
        """The maximum number of tokens of a step that a process computes.

        Args:
            length: tokens per sample.
            samples: of the step, in all processes.
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
        """The maximum of each number over all processes.

        Args:
            values: the same count on each process.
            device: this process's device, for the collective.
        """
        if self.world == 1:
            return list(values)
        maxima = torch.tensor(values, dtype=torch.float64, device=device)
        dist.all_reduce(maxima, dist.ReduceOp.MAX)
        return maxima.tolist()

    def barrier(self) -> None:
        """Wait until all processes are here and their devices are idle."""
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
        """The first process's value of something that may differ between processes, such as a clock."""
        if self.world == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values)
        return values[0]

    @contextmanager
    def one_line_errors(self) -> Iterator[None]:
        """Turn the errors of distributed runs into one line.

        Raises:
            ConnectionError: another process is gone.
            UserError: this process's device ran out of memory. The step cannot be skipped: others may wait in it.
        """
        try:
            yield
        except torch.OutOfMemoryError as error:
            if self.world == 1:
                raise UserError(
                    "the device ran out of memory: lower data.length_max (lengths, in an evaluation), use "
                    "step.memory=least, or stop what else runs on it"
                ) from error
            raise UserError(
                f"process {self.rank} of {self.world} ran out of device memory: use step.memory=least, fewer tokens, "
                "more trainer.devices or a larger step.sequence_parallel"
            ) from error
        except RuntimeError as error:
            if self.world == 1 or not (isinstance(error, dist.DistError) or "gloo" in str(error)):
                raise
            raise ConnectionError("another process of this run has ended or does not respond") from error
