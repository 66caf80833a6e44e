"""Ulysses sequence parallelism: processes that share a sample's tokens exchange them for heads, and back.

Each process computes everything but attention for its own tokens; in attention it has all tokens of some heads.
Source: DeepSpeed-Ulysses (Jacobs et al. 2023, arXiv 2309.14509). DeepSpeed's own class for transformers refuses heads
that do not divide among the processes, and its exchange of uneven heads takes only models without grouped queries.
"""

from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed._functional_collectives import all_to_all_single_autograd

from duo_id.common.errors import UserError


@dataclass(frozen=True)
class Share:
    """The heads of one process: a range of query heads, and the KV heads that they read."""

    heads: slice
    kv_heads: slice

    @property
    def sizes(self) -> tuple[int, int]:
        """How many query heads and KV heads."""
        return _size(self.heads), _size(self.kv_heads)

    @property
    def rows(self) -> int:
        """Rows of a token that the process needs: queries, keys and values of its heads."""
        heads, kv_heads = self.sizes
        return heads + 2 * kv_heads


def head_shares(heads: int, kv_heads: int, parts: int) -> list[Share]:
    """Divide heads among `parts` processes, such that all KV heads of a process have equally many query heads.

    KV heads stay whole while there are enough of them; otherwise several processes hold the same KV head, each with
    some of its query heads.

    Raises:
        UserError: there are fewer query heads than processes.
    """
    if parts > heads:
        raise UserError(
            f"step.sequence_parallel={parts}: the model has {heads} heads to share, so step.sequence_parallel={heads} "
            "is the most"
        )
    group = heads // kv_heads
    if parts <= kv_heads:
        return [
            Share(slice(start * group, end * group), slice(start, end))
            for start, end in pairwise(_cuts(kv_heads, parts))
        ]
    shares = []
    for head, (start, end) in enumerate(pairwise(_cuts(parts, kv_heads))):
        for first, last in pairwise(_cuts(group, end - start)):
            shares.append(Share(slice(head * group + first, head * group + last), slice(head, head + 1)))
    return shares


class Exchange:
    """The exchange of one attention layer among the processes of a group."""

    def __init__(self, group: dist.ProcessGroup, heads: int, kv_heads: int) -> None:
        """Divide the layer's heads among the group."""
        self.group = group
        self.shares = head_shares(heads, kv_heads, group.size())
        self.share = self.shares[group.rank()]

    def to_heads(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """From all heads of this process's tokens to all tokens of this process's heads.

        Args:
            query: (batch, heads, tokens of this process, head_dim).
            key: (batch, KV heads, tokens of this process, head_dim).
            value: the same shape.

        Returns:
            query, key and value of this process's heads, over the tokens of the whole group.
        """
        rows = [x for s in self.shares for x in (query[:, s.heads], key[:, s.kv_heads], value[:, s.kv_heads])]
        packed = torch.cat(rows, dim=1).transpose(0, 1).contiguous()  # (rows, batch, tokens, head_dim)
        parts, share = len(self.shares), self.share
        received = all_to_all_single_autograd(
            packed, [share.rows] * parts, [part.rows for part in self.shares], self.group
        )
        gathered = received.unflatten(0, (parts, share.rows)).permute(2, 1, 0, 3, 4).flatten(2, 3)
        heads, kv_heads = share.sizes
        query, key, value = gathered.split([heads, kv_heads, kv_heads], dim=1)
        return query, key, value

    def to_tokens(self, out: Tensor) -> Tensor:
        """The way back: (batch, its heads, all tokens, head_dim) to (batch, all heads, its tokens, head_dim)."""
        processes, heads = len(self.shares), out.shape[1]
        packed = out.unflatten(2, (processes, -1)).permute(2, 1, 0, 3, 4).flatten(0, 1).contiguous()
        received = all_to_all_single_autograd(
            packed, [_size(share.heads) for share in self.shares], [heads] * processes, self.group
        )
        return received.transpose(0, 1)


def from_previous(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The `x` (rows, ...) of the previous process in the group; the first process gets that of the last."""
    processes, rank, rows = group.size(), group.rank(), x.shape[0]
    send_counts, receive_counts = ([0] * processes for _ in range(2))
    send_counts[(rank + 1) % processes] = receive_counts[(rank - 1) % processes] = rows
    return all_to_all_single_autograd(x.contiguous(), receive_counts, send_counts, group)


def _cuts(count: int, parts: int) -> list[int]:
    """Boundaries that cut `count` items into `parts` runs whose lengths differ by at most one."""
    return [-(-count * part // parts) for part in range(parts + 1)]


def _size(run: slice) -> int:
    return int(run.stop - run.start)
