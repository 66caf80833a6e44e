"""The one attention function of all model families: registered with transformers, steered layer by layer.

Every attention module of an attached model holds one function `(query, key, value, softmax) -> output`, bound to it
as a plain attribute. Which function of `duo_id.attention.heads` that is decides what the layer does.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from duo_id.attention.exchange import Exchange
from duo_id.attention.full import dense_attention
from duo_id.attention.heads import AttendFunction, Backends, own_attention
from duo_id.attention.padding import padding_mask, rolled
from duo_id.attention.probe import BOUND, AttentionLayer, find_layers, gated_layers
from duo_id.attention.rows import last_mlp_at_rows
from duo_id.attention.softmax import Softmax
from duo_id.errors import UserError

IMPLEMENTATION = "duo_id"  # the name under which transformers knows the attention function
PROBE = "duo_id_probe"  # and the one that finds the layers, which other models may not notice
EXCHANGE = "duo_id_exchange"  # of attention modules: how processes that share a sample's tokens get together there


class CachedKeys(Protocol):
    """What a cache that keeps heads apart returns in place of keys: it holds the past and attends by itself."""

    def attend(self, module: nn.Module, query: Tensor, softmax: Softmax) -> Tensor: ...  # noqa: D102


def register() -> None:
    """Make `attn_implementation="duo_id"` known to transformers; calling it again changes nothing."""
    for name in (IMPLEMENTATION, PROBE):
        AttentionInterface.register(name, attention_forward)
        AttentionMaskInterface.register(name, padding_mask)


@contextmanager
def attached(
    model: PreTrainedModel, backends: Backends | None = None, group: dist.ProcessGroup | None = None
) -> Iterator[list[AttentionLayer]]:
    """Route the attention of `model` through this module; afterwards the model is as it was.

    A probe forward of a few tokens finds the attention layers and proves that each reaches our function.

    Args:
        model: any causal language model of transformers.
        backends: implementations; all automatic by default.
        group: processes that share the tokens of each sample; None: this one has all.

    Yields:
        the layers that can be gated: those that see the whole context, in the model's order.

    Raises:
        UserError: the model has no layer that can be gated, or one that should be does not reach our function.
    """
    with routed(model, backends or Backends()) as layers:
        gated = gated_layers(model, layers)
        if group is None:
            with last_mlp_at_rows(model, gated):
                yield gated
        else:
            with _exchanging(model, layers, group):
                yield [replace(layer, own=getattr(layer.module, EXCHANGE).own.kv_heads) for layer in gated]


@contextmanager
def routed(model: PreTrainedModel, backends: Backends) -> Iterator[list[AttentionLayer]]:
    """As `attached`, but all attention layers are yielded, also those that cannot be gated."""
    before = model.config._attn_implementation
    register()
    layers: list[AttentionLayer] = []
    try:
        model.set_attn_implementation(PROBE)
        layers = find_layers(model, PROBE)
        model.set_attn_implementation(IMPLEMENTATION)
        for layer in layers:
            setattr(layer.module, BOUND, partial(own_attention, window=layer.window, backends=backends))
        yield layers
    finally:
        for layer in layers:
            layer.module.__dict__.pop(BOUND, None)
        model.set_attn_implementation(before)


@contextmanager
def _exchanging(model: PreTrainedModel, layers: Sequence[AttentionLayer], group: dist.ProcessGroup) -> Iterator[None]:
    """Let each layer's attention gather the tokens of the whole group, for a share of its heads."""
    depth = model.config.get_text_config().num_hidden_layers
    if len(layers) < depth or any(layer.obstacle for layer in layers):
        raise UserError(
            f"step.sequence_parallel={group.size()}: a layer of the model mixes tokens otherwise than by attention "
            "that can be gated, and each process has a part of them alone; use step.sequence_parallel=1"
        )
    for layer in layers:
        setattr(layer.module, EXCHANGE, Exchange(group, layer.heads, layer.kv_heads))
    try:
        yield
    finally:
        for layer in layers:
            layer.module.__dict__.pop(EXCHANGE, None)


@contextmanager
def bound(layers: Sequence[AttentionLayer], functions: Mapping[int, AttendFunction]) -> Iterator[None]:
    """Let those of `layers` whose index `functions` holds do that, until the block ends."""
    before = bound_functions(layers)
    try:
        for layer in layers:
            setattr(layer.module, BOUND, functions.get(layer.index, before[layer.index]))
        yield
    finally:
        for layer in layers:
            setattr(layer.module, BOUND, before[layer.index])


def bound_functions(layers: Sequence[AttentionLayer]) -> dict[int, AttendFunction]:
    """What each of `layers` does at present, under its index."""
    return {layer.index: getattr(layer.module, BOUND) for layer in layers}


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor | CachedKeys,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **unused: Any,
) -> tuple[Tensor, None]:
    """What transformers calls in every layer: (batch, heads, tokens, dim) in, (batch, tokens, heads, dim) out."""
    softmax = Softmax(scaling, softcap, s_aux)
    if not isinstance(key, Tensor):
        return key.attend(module, query, softmax).transpose(1, 2).contiguous(), None
    if key.shape[2] != query.shape[2]:
        raise UserError("this cache is not for gated or masked heads: call the model with use_cache=False")
    attend = getattr(module, BOUND)
    if (exchange := getattr(module, EXCHANGE, None)) is not None:
        assert attention_mask is None, "`split_batch` leaves no padding that causality does not hide"
        own = softmax if s_aux is None else softmax._replace(sinks=s_aux[exchange.own.heads])
        out = exchange.to_tokens(attend(*exchange.to_heads(query, key, value), own))
    elif attention_mask is None:
        out = attend(query, key, value, softmax)
    elif attention_mask.dim() == 4:
        if getattr(attend, "func", None) is not own_attention:
            raise UserError("heads cannot be gated or masked over packed sequences or a matrix as attention_mask")
        out = dense_attention(query, key, value, softmax, attention_mask)
    else:
        # Real tokens come first, so that causality alone hides the padding, whichever side it was on.
        start = attention_mask.to(torch.int32).argmax(-1)
        out = rolled(attend(*(rolled(x, start) for x in (query, key, value)), softmax), -start)
    return out.transpose(1, 2).contiguous(), None
