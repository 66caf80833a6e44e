"""Attention of streaming heads over a paged cache: which blocks a step reads, and the step itself; torch alone.

A cache is (blocks, 1, block_size, 2 * head_dim), a token's key and then its value, as in vLLM's layout of a layer with
one KV head. A block table names the block of each `block_size` tokens of a request; entries of blocks that no query
sees may be anything, as vLLM has freed them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from duo_id.attention.softmax import Softmax
from duo_id.attention.streaming import streaming_attention
from duo_id.attention.window import Window


@dataclass(frozen=True)
class Places:
    """Where tokens lie in a cache: their blocks, and their offsets within them, int64 of the same shape."""

    blocks: Tensor
    offsets: Tensor

    def read(self, cache: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values, (*shape, head_dim) each."""
        keys, values = cache[self.blocks, 0, self.offsets].chunk(2, -1)
        return keys, values


@dataclass(frozen=True)
class Decoding:
    """Requests with one query each.

    Attributes:
        rows: (requests,) their queries in the batch.
        places: (requests, width) of the tokens that they see: the sink, then the latest ones.
        visible: (requests, width) whether there is such a token; not where a context is shorter than its window.
    """

    rows: Tensor
    places: Places
    visible: Tensor


@dataclass(frozen=True)
class Chunk:
    """A request with several queries: those of its last tokens.

    Attributes:
        rows: its queries in the batch.
        places: (tokens,) of all tokens that one of them sees, in their order.
    """

    rows: slice
    places: Places


@dataclass(frozen=True)
class Plan:
    """What a step of a batch reads; the layers of one cache group share it."""

    window: Window
    decoding: Decoding | None
    chunks: tuple[Chunk, ...]


def make_plan(window: Window, block_size: int, starts: Sequence[int], lengths: Sequence[int], table: Tensor) -> Plan:
    """What the streaming heads of a window read in a step.

    Args:
        window: of the heads.
        block_size: tokens of a block.
        starts: of each request's queries in the batch, and the end of the last one's.
        lengths: of each request's context, with the new tokens.
        table: (requests, blocks) block table.
    """
    counts = [end - start for start, end in pairwise(starts)]
    single = [row for row, count in enumerate(counts) if count == 1]
    chunks = [
        Chunk(
            slice(starts[row], starts[row + 1]),
            _places(_seen(window, lengths[row], count, table.device), table[row], block_size),
        )
        for row, count in enumerate(counts)
        if count > 1
    ]
    return Plan(window, _decoding(window, block_size, single, starts, lengths, table) if single else None, (*chunks,))


def write(cache: Tensor, key: Tensor, value: Tensor, slots: Tensor) -> None:
    """Store the new tokens of a step.

    Args:
        cache: of the head.
        key: (at least tokens, 1, head_dim).
        value: the same shape.
        slots: (tokens,) block * block_size + offset of each; -1: not a token.
    """
    tokens = slots >= 0
    slots, size = slots[tokens].long(), cache.shape[2]
    both = torch.cat([x[: len(tokens)][tokens, 0] for x in (key, value)], -1)
    cache[slots // size, 0, slots % size] = both.to(cache.dtype)


def attend(plan: Plan, query: Tensor, cache: Tensor, softmax: Softmax, out: Tensor) -> None:
    """Attention of the query heads of one streaming KV head, written to `out`.

    Args:
        plan: of the step.
        query: (at least tokens, heads, head_dim).
        cache: of the head, with the new tokens.
        softmax: of the layer.
        out: the shape of `query`.
    """
    if (step := plan.decoding) is not None:
        key, value = step.places.read(cache)
        out[step.rows] = _attend_single(query[step.rows], key[:, None], value[:, None], step.visible, softmax)
    for chunk in plan.chunks:
        key, value = chunk.places.read(cache)
        heads_first = query[chunk.rows].transpose(0, 1)[None]
        attended = streaming_attention(heads_first, key[None, None], value[None, None], softmax, plan.window)
        out[chunk.rows] = attended[0].transpose(0, 1)


def _attend_single(query: Tensor, key: Tensor, value: Tensor, visible: Tensor, softmax: Softmax) -> Tensor:
    """Attention (requests, heads, head_dim) of single queries over (requests, 1, width, head_dim)."""
    visible = visible[:, None, None]
    if not softmax.plain:
        return softmax.attend(query[:, :, None], key, value, visible)[:, :, 0]
    return F.scaled_dot_product_attention(query[:, None], key, value, attn_mask=visible, scale=softmax.scale)[:, 0]


def _decoding(
    window: Window, block_size: int, single: list[int], starts: Sequence[int], lengths: Sequence[int], table: Tensor
) -> Decoding:
    device = table.device
    length = torch.tensor([lengths[row] for row in single], device=device)[:, None]
    width = min(window.sink_size + window.recent_size, max(lengths[row] for row in single))
    column = torch.arange(width, device=device)
    latest = (length - window.recent_size).clamp(min=window.sink_size) + column - window.sink_size
    position = torch.where(column < window.sink_size, column, latest)
    visible = position < length
    places = _places(position.where(visible, 0), table[single], block_size)
    return Decoding(torch.tensor([starts[row] for row in single], device=device), places, visible)


def _seen(window: Window, length: int, count: int, device: torch.device) -> Tensor:
    """The positions of the tokens that one of the last `count` queries of a context sees, ascending."""
    sink = min(window.sink_size, length)
    first = min(max(sink, length - count - window.recent_size + 1), length)  # in the window of the first query
    return torch.cat([torch.arange(sink, device=device), torch.arange(first, length, device=device)])


def _places(position: Tensor, table: Tensor, block_size: int) -> Places:
    return Places(table.gather(-1, position // block_size).long(), position % block_size)
