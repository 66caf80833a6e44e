"""How a layer turns scores into attention weights, and attention for layers that no fast backend supports."""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from duo_id.attention.window import Window

ROWS = 128  # queries whose weights are held at the same time


class Softmax(NamedTuple):
    """A layer's softmax: everything between the products of queries and keys and the attention weights.

    Attributes:
        scale: factor on the products of queries and keys; None: 1/sqrt(head_dim).
        softcap: c of score = c * tanh(score / c); None: no soft cap.
        sinks: (heads,) or (batch, heads), a learned score of each query head that takes its share of the softmax and
            has no value; None: no such scores.
    """

    scale: float | None = None
    softcap: float | None = None
    sinks: Tensor | None = None

    @property
    def plain(self) -> bool:
        """Whether there is only a scale, which every backend supports."""
        return self.softcap is None and self.sinks is None

    def factor(self, dim: int) -> float:
        """The scale for heads of width `dim`."""
        return dim**-0.5 if self.scale is None else self.scale

    def of(self, indices: Sequence[int] | Tensor, kv_heads: int) -> "Softmax":
        """The softmax of the query heads that belong to the KV heads `indices`, out of `kv_heads`."""
        if self.sinks is None:
            return self
        return self._replace(sinks=self.sinks.unflatten(-1, (kv_heads, -1))[..., indices, :].flatten(-2))

    def scores(self, query: Tensor, key: Tensor, visible: Tensor) -> Tensor:
        """Scores (batch, heads, queries, keys), float32 or wider, -inf where not `visible`; see `weights`."""
        kv_heads, queries = key.shape[1], query.shape[2]
        grouped = query.unflatten(1, (kv_heads, -1)).flatten(2, 3)  # so that keys are not repeated
        scores = (grouped @ key.mT).unflatten(2, (query.shape[1] // kv_heads, queries)).flatten(1, 2)
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32)) * self.factor(query.shape[-1])
        if self.softcap is not None:
            scores = self.softcap * torch.tanh(scores / self.softcap)
        return scores.masked_fill(~visible, -torch.inf)

    def weights(self, query: Tensor, key: Tensor, visible: Tensor) -> Tensor:
        """Attention weights.

        Args:
            query: (batch, heads, queries, head_dim).
            key: (batch, KV heads, keys, head_dim).
            visible: bool, broadcast to (batch, heads, queries, keys): what each query sees, at least itself.

        Returns:
            (batch, heads, queries, keys), float32 or wider; rows sum to 1, or to less with a sink.
        """
        scores = self.scores(query, key, visible)
        if self.sinks is None:
            return scores.softmax(-1)
        sinks = self.sinks.to(scores.dtype)[..., None, None].expand(*scores.shape[:-1], 1)
        return torch.cat([scores, sinks], -1).softmax(-1)[..., :-1]

    def attend(self, query: Tensor, key: Tensor, value: Tensor, visible: Tensor) -> Tensor:
        """Attention, (batch, heads, queries, head_dim), over what is `visible`; see `weights`."""
        return _weighted(self.weights(query, key, visible), value)

    def attend_part(self, query: Tensor, key: Tensor, value: Tensor, visible: Tensor) -> tuple[Tensor, Tensor]:
        """Attention over a part of what is to be seen, without sinks, and the log-sum-exp of its scores; see `weights`.

        Returns:
            (batch, heads, queries, head_dim), zeros where nothing is visible, and (batch, heads, queries), -inf there.
        """
        scores = self.scores(query, key, visible)
        highest = scores.amax(-1, keepdim=True).clamp(min=torch.finfo(scores.dtype).min)
        shares = (scores - highest).exp()
        total = shares.sum(-1, keepdim=True)
        out = _weighted(shares / total.clamp(min=torch.finfo(total.dtype).tiny), value)
        return out, (highest + total.log()).squeeze(-1)


def _weighted(weights: Tensor, value: Tensor) -> Tensor:
    """Sums (batch, heads, queries, head_dim) of values, whose heads are fewer than those of the weights."""
    grouped = weights.to(value.dtype).unflatten(1, (value.shape[1], -1)).flatten(2, 3) @ value
    return grouped.unflatten(2, (-1, weights.shape[2])).flatten(1, 2)


def join(parts: Iterable[tuple[Tensor, Tensor]], softmax: Softmax) -> Tensor:
    """Attention over several parts, weighted by their shares of the softmax; no gradient.

    Args:
        parts: attention (batch, heads, queries, head_dim) over each part and the log-sum-exp (batch, heads, queries) of
            its scores, as `Softmax.attend_part` returns them; in the first part each query sees something.
        softmax: of the layer; its sinks take their share.

    Returns:
        (batch, heads, queries, head_dim), float32 or wider.
    """
    parts = iter(parts)
    first, log_sum = next(parts)
    out = first.to(torch.promote_types(first.dtype, torch.float32))
    for part, part_sum in parts:
        total = torch.logaddexp(log_sum, part_sum)
        out = out * (log_sum - total).exp()[..., None] + part * (part_sum - total).exp()[..., None]
        log_sum = total
    if softmax.sinks is not None:
        out = out * torch.sigmoid(log_sum - softmax.sinks[..., None].to(log_sum.dtype))[..., None]
    return out


def attend_at(
    query: Tensor, key: Tensor, value: Tensor, softmax: Softmax, rows: Tensor, window: Window | None = None
) -> Tensor:
    """Causal attention of a few queries anywhere in the context.

    Args:
        query: (batch, heads, n, head_dim).
        key: (batch, KV heads, tokens, head_dim).
        value: the same shape.
        softmax: of the layer.
        rows: (n,) positions of the queries.
        window: what streaming heads see; None: the whole context.

    Returns:
        (batch, heads, n, head_dim).
    """
    tokens, kv_heads = key.shape[2], key.shape[1]
    visible = (window or Window(0, tokens)).dense(rows, torch.arange(tokens, device=rows.device))
    if not softmax.plain:
        return softmax.attend(query, key, value, visible)
    grouped = query.unflatten(1, (kv_heads, -1)).flatten(2, 3)  # so that keys are not repeated
    visible = visible.repeat(query.shape[1] // kv_heads, 1)
    out = F.scaled_dot_product_attention(grouped, key, value, attn_mask=visible, scale=softmax.scale)
    return out.unflatten(2, (-1, len(rows))).flatten(1, 2)


def attend_by_rows(query: Tensor, key: Tensor, value: Tensor, softmax: Softmax, window: Window | None = None) -> Tensor:
    """Causal attention for any softmax, `ROWS` queries at a time; the backward pass recomputes their weights.

    Args:
        query: (batch, heads, queries, head_dim), of the last tokens.
        key: (batch, KV heads, tokens, head_dim), tokens >= queries.
        value: the same shape.
        softmax: of the layer.
        window: what streaming heads see; None: the whole context.

    Returns:
        (batch, heads, queries, head_dim).
    """
    past = key.shape[2] - query.shape[2]
    window = window or Window(0, key.shape[2])
    gradient = torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value))
    parts = []
    for start in range(0, query.shape[2], ROWS):
        rows = query[:, :, start : start + ROWS]
        first, end = past + start, past + start + rows.shape[2]
        window_start = max(window.sink_size, first - window.recent_size + 1)  # of the first query, after the sink
        key_positions = torch.arange(end, device=key.device)
        inputs: list[Any] = [rows, key[:, :, :end], value[:, :, :end]]
        if window_start > window.sink_size:
            key_positions, *inputs[1:] = (
                torch.cat([x.narrow(d, 0, window.sink_size), x.narrow(d, window_start, end - window_start)], d)
                for x, d in ((key_positions, 0), (inputs[1], 2), (inputs[2], 2))
            )
        inputs.append(window.dense(torch.arange(first, end, device=key.device), key_positions))
        if gradient:
            parts.append(checkpoint(softmax.attend, *inputs, use_reentrant=False, preserve_rng_state=False))
        else:
            parts.append(softmax.attend(*inputs))
    return torch.cat(parts, 2)
