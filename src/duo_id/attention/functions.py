"""The kinds of attention that a layer's heads can compute, as functions `(query, key, value, softmax) -> output`.

Gated blends, hard masks, streaming alone, recording, the model's own; `duo_id.attention.interface` binds them.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from duo_id.attention.blends import Blend
from duo_id.attention.full import full_attention
from duo_id.attention.layers import AttentionLayer
from duo_id.attention.softmax import Softmax
from duo_id.attention.streaming import spans_attention, streaming_attention
from duo_id.attention.window import Window

BLEND_CHUNK = 2**22  # elements blended at a time: 16 MiB in float32, small enough for caches, large beside a launch
AttendFunction = Callable[..., Tensor]  # of query, key, value and softmax; in training also of `rows`, see `AtRows`


@dataclass(frozen=True)
class Backends:
    """Which implementations compute attention; see `full_attention` and `streaming_attention`."""

    full: str = "auto"
    streaming: str = "auto"
    compiled: bool = False  # whether blends are compiled, which makes them one pass over memory


class Mask(Protocol):
    """What a hard mask says: `spans`, int32 (layers, KV heads), -1 = all tokens, and the sink, both in tokens."""

    @property
    def spans(self) -> Tensor: ...  # noqa: D102
    @property
    def sink_size(self) -> int: ...  # noqa: D102


def gated_heads(
    alpha: Tensor, window: Window, blend: Blend, backends: Backends, teacher: Tensor | None = None
) -> AttendFunction:
    """A layer whose heads blend full and streaming attention: alpha * full + (1 - alpha) * streaming.

    Source: DuoAttention, section 2.2, equation 1.

    Args:
        alpha: (KV heads,) float32 gates of this layer.
        window: what streaming attention sees.
        blend: whose full attention is blended in, the student's or the teacher's.
        backends: implementations.
        teacher: (batch, heads, queries, head_dim), the teacher's full attention output, for blends that need it.
    """

    def attend(query: Tensor, key: Tensor, value: Tensor, softmax: Softmax, rows: Tensor | None = None) -> Tensor:
        gate = alpha.repeat_interleave(query.shape[1] // key.shape[1])[:, None, None]
        full = blend.full(lambda: full_attention(query, key, value, softmax, backends.full, rows), teacher)
        streaming = streaming_attention(query, key, value, softmax, window, backends.streaming, rows)
        return (_compiled_blend() if backends.compiled else _BlendInParts.apply)(gate, full, streaming)

    return attend


def _blend(gate: Tensor, full: Tensor, streaming: Tensor) -> Tensor:
    """Blend two outputs (batch, heads, tokens, head_dim), weighted by gate (heads, 1, 1) and 1 - gate, in float32."""
    assert gate.dtype in (torch.float32, torch.float64), "gates are never rounded to the model's dtype"
    return (gate * full + (1 - gate) * streaming).to(streaming.dtype)


class _BlendInParts(torch.autograd.Function):
    """`_blend`, a few heads at a time, forward and backward: float32 intermediates never span the whole layer.

    A head's gradient is a sum over that head alone, so chunking changes nothing but memory use (and time on a CPU).
    """

    @staticmethod
    def forward(ctx: Any, gate: Tensor, full: Tensor, streaming: Tensor) -> Tensor:
        ctx.save_for_backward(gate, full, streaming)
        out = torch.empty_like(streaming)
        for heads in _parts(streaming):
            out[:, heads] = _blend(gate[heads], full[:, heads], streaming[:, heads])
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        needed, saved = ctx.needs_input_grad, ctx.saved_tensors
        gate, full, streaming = saved
        grads = [torch.empty_like(x) if wants else None for x, wants in zip(saved, needed, strict=True)]
        gate_grad, full_grad, streaming_grad = grads
        for heads in _parts(streaming):
            part = grad[:, heads].to(torch.promote_types(grad.dtype, gate.dtype))
            if gate_grad is not None:
                sums = ((part * x[:, heads]).sum((0, 2, 3))[:, None, None] for x in (full, streaming))
                gate_grad[heads] = next(sums) - next(sums)
            if full_grad is not None:
                full_grad[:, heads] = (gate[heads] * part).to(full.dtype)
            if streaming_grad is not None:
                streaming_grad[:, heads] = ((1 - gate[heads]) * part).to(streaming.dtype)
        return tuple(grads)


def _parts(outputs: Tensor) -> Iterator[slice]:
    """Slices over the heads of (batch, heads, tokens, head_dim), of about `BLEND_CHUNK` elements each."""
    count = max(1, BLEND_CHUNK * outputs.shape[1] // max(outputs.numel(), 1))
    return (slice(first, first + count) for first in range(0, outputs.shape[1], count))


@functools.cache
def _compiled_blend() -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    return torch.compile(_blend, dynamic=True)


def masked_heads(spans: Tensor, sink_size: int, backends: Backends) -> AttendFunction:
    """A layer with a hard mask: each head sees the sink and its span of latest tokens.

    One call computes the retrieval heads and those whose windows leave no gap in the text, another all others.

    Args:
        spans: (KV heads,) int32, in tokens; -1 for retrieval heads, which see the whole context.
        sink_size: first tokens that every head sees.
        backends: implementations.
    """
    each = spans.tolist()

    def attend(query: Tensor, key: Tensor, value: Tensor, softmax: Softmax, rows: Tensor | None = None) -> Tensor:
        kv_heads, tokens = key.shape[1], key.shape[2]
        full = [head for head, span in enumerate(each) if span < 0 or sink_size + span >= tokens]
        streaming = [head for head in range(kv_heads) if head not in full]
        see = partial(spans_attention, spans=[each[head] for head in streaming], sink_size=sink_size)
        functions = (
            (full, partial(full_attention, backend=backends.full, rows=rows)),
            (streaming, partial(see, backend=backends.streaming, rows=rows)),
        )
        for heads, function in functions:
            if len(heads) == kv_heads:
                return function(query, key, value, softmax)
        grouped = query.unflatten(1, (kv_heads, -1))
        out = torch.empty_like(grouped)
        for heads, function in functions:
            inputs = (grouped[:, heads].flatten(1, 2), key[:, heads], value[:, heads], softmax.of(heads, kv_heads))
            out[:, heads] = function(*inputs).unflatten(1, (len(heads), -1))
        return out.flatten(1, 2)

    return attend


def masked_rows(retrieval: Tensor, window: Window, backends: Backends) -> AttendFunction:
    """A layer with a separate hard mask for each row of the batch.

    Args:
        retrieval: (rows, KV heads) bool CPU tensor, True for retrieval heads.
        window: what streaming heads see.
        backends: implementations.
    """
    flat = retrieval.flatten()
    full, streaming = flat.nonzero()[:, 0], (~flat).nonzero()[:, 0]

    def attend(query: Tensor, key: Tensor, value: Tensor, softmax: Softmax) -> Tensor:
        rows, kv_heads = key.shape[:2]
        grouped = query.unflatten(1, (kv_heads, -1)).flatten(0, 1)  # (rows * KV heads, group, tokens, head_dim)
        key, value = (x.flatten(0, 1)[:, None] for x in (key, value))
        sinks = None if softmax.sinks is None else softmax.sinks.view(kv_heads, -1).repeat(rows, 1)
        out = torch.empty_like(grouped)
        for indices, function in (
            (full, partial(full_attention, backend=backends.full)),
            (streaming, partial(streaming_attention, window=window, backend=backends.streaming)),
        ):
            if len(indices):
                heads = indices.to(query.device)
                group_softmax = softmax if sinks is None else softmax._replace(sinks=sinks[heads])
                out[heads] = function(grouped[heads], key[heads], value[heads], group_softmax)
        return out.unflatten(0, (rows, kv_heads)).flatten(1, 2)

    return attend


def masked_layers(layers: Sequence[AttentionLayer], mask: Mask, backends: Backends) -> dict[int, AttendFunction]:
    """The function of each gated layer under a hard mask (a `HeadMask` or `HeadSpans`), for `bound`."""
    spans = mask.spans
    return {layer.index: masked_heads(spans[layer.index][layer.own], mask.sink_size, backends) for layer in layers}


def streaming_heads(window: Window, backends: Backends) -> AttendFunction:
    """A layer whose heads all stream."""
    return partial(streaming_attention, window=window, backend=backends.streaming)


def recording_heads(outputs: dict[int, Tensor], index: int, backends: Backends) -> AttendFunction:
    """A full-attention layer that stores its output in `outputs[index]`, for blends with the teacher."""

    def attend(query: Tensor, key: Tensor, value: Tensor, softmax: Softmax, rows: Tensor | None = None) -> Tensor:
        outputs[index] = full_attention(query, key, value, softmax, backends.full, rows)
        return outputs[index]

    return attend


def own_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    softmax: Softmax,
    window: int | None,
    backends: Backends,
    rows: Tensor | None = None,
) -> Tensor:
    """A layer as its model defines it: full attention, or a sliding window, i.e. streaming heads without a sink."""
    if window is None:
        return full_attention(query, key, value, softmax, backends.full, rows)
    return streaming_attention(query, key, value, softmax, Window(0, window), backends.streaming, rows)
