"""Ulysses sequence parallelism: processes that share a sample's tokens exchange them for heads, and back.

Each process computes everything but attention for its own tokens; in attention it has all tokens, for some heads.
Source: DeepSpeed-Ulysses (Jacobs et al. 2023, arXiv 2309.14509). DeepSpeed's own class for transformers refuses heads
that the processes do not divide, and its exchange of uneven heads takes models without groups of query heads alone.
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
        """Rows of a token that the process needs: its queries, keys and values."""
        heads, kv_heads = self.sizes
        return heads + 2 * kv_heads


def head_shares(heads: int, kv_heads: int, parts: int) -> list[Share]:
    """Divide heads among `parts` processes, so that in each all of its KV heads have equally many query heads.

    KV heads stay whole while there are enough of them; else several processes have the same KV head and a part of its
    query heads each.

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
    """What one attention layer does among the processes of a group."""

    def __init__(self, group: dist.ProcessGroup, heads: int, kv_heads: int) -> None:
        """Divide the layer's heads among the group."""
        self.group = group
        self.shares = head_shares(heads, kv_heads, group.size())
        self.own = self.shares[group.rank()]

    def to_heads(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """All heads of this process's tokens to all tokens of its heads.

        Args:
            query: (batch, heads, tokens of this process, head_dim).
            key: (batch, KV heads, tokens of this process, head_dim).
            value: the same shape.

        Returns:
            the three for this process's heads, over the tokens of the whole group.
        """
        rows = [
            part for own in self.shares for part in (query[:, own.heads], key[:, own.kv_heads], value[:, own.kv_heads])
        ]
        packed = torch.cat(rows, dim=1).transpose(0, 1).contiguous()  # (rows, batch, tokens, head_dim)
        parts, own = len(self.shares), self.own
        received = all_to_all_single_autograd(
            packed, [own.rows] * parts, [share.rows for share in self.shares], self.group
        )
        whole = received.unflatten(0, (parts, own.rows)).permute(2, 1, 0, 3, 4).flatten(2, 3)
        heads, kv_heads = own.sizes
        query, key, value = whole.split([heads, kv_heads, kv_heads], dim=1)
        return query, key, value

    def to_tokens(self, out: Tensor) -> Tensor:
        """Back: (batch, heads of this process, all tokens, head_dim) to (batch, all heads, its tokens, head_dim)."""
        parts, heads = len(self.shares), out.shape[1]
        packed = out.unflatten(2, (parts, -1)).permute(2, 1, 0, 3, 4).flatten(0, 1).contiguous()
        received = all_to_all_single_autograd(
            packed, [_size(share.heads) for share in self.shares], [heads] * parts, self.group
        )
        return received.transpose(0, 1)


def from_previous(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """What the process before this one in the group, or for the first the last one, has as `x` (rows, ...)."""
    parts, part, rows = group.size(), group.rank(), x.shape[0]
    sent, received = ([0] * parts for _ in range(2))
    sent[(part + 1) % parts] = received[(part - 1) % parts] = rows
    return all_to_all_single_autograd(x.contiguous(), received, sent, group)


def _cuts(count: int, parts: int) -> list[int]:
    """Where `count` things are cut into `parts` runs whose lengths differ by one at most."""
    return [-(-count * part // parts) for part in range(parts + 1)]


def _size(run: slice) -> int:
    return int(run.stop - run.start)
