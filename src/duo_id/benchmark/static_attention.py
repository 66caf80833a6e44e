"""Full attention over transformers' static cache, as fast as SDPA allows: the baseline of deployed masks.

The cache passes all its slots to attention, filled or not, and transformers masks the free ones, which rules out SDPA's
fast backends. Here the host counts the tokens, and attention sees only the filled slots.
"""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AttentionInterface, PreTrainedModel

from duo_id.attention.full import full_attention
from duo_id.attention.layers import AttentionLayer
from duo_id.attention.softmax import Softmax
from duo_id.benchmark.timing import time_runs
from duo_id.deploy.graphs import capture_graph

IMPLEMENTATION = "duo_id_baseline"  # the name under which transformers knows the attention function
DECODE_BACKENDS = (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION)


@dataclass
class HostState:
    """The host's view of the one cache in use; hidden from compiled code, which would recompile for each value.

    Attributes:
        tokens: in the cache, including those of the current forward pass.
        first: index of the layer that counts them.
        backend: of SDPA for a decode step; None: SDPA's own choice.
    """

    tokens: int = 0
    first: int = 0
    backend: SDPBackend | None = None


host = HostState()


@torch.library.custom_op("duo_id::filled_attention", mutates_args=())
def filled_attention(query: Tensor, key: Tensor, value: Tensor, scale: float, counts: bool) -> Tensor:
    """Attention over the filled slots of a static cache, whose latest tokens are the queries'.

    Args:
        query: (batch, heads, queries, head_dim).
        key: (batch, KV heads, slots, head_dim), including the new tokens'.
        value: the same shape.
        scale: factor on the scores.
        counts: whether this layer counts the forward's tokens.

    Returns:
        (batch, queries, heads, head_dim).
    """
    if counts:
        host.tokens += query.shape[2]
    key, value = (x[:, :, : host.tokens] for x in (key, value))
    if query.shape[2] == 1:
        with nullcontext() if host.backend is None else sdpa_kernel(host.backend):
            out = full_attention(query, key, value, Softmax(scale), "sdpa")
    else:
        out = full_attention(query, key, value, Softmax(scale))
    return out.transpose(1, 2).contiguous()


@filled_attention.register_fake
def _(query: Tensor, *args: object) -> Tensor:
    batch, heads, queries, dim = query.shape
    return query.new_empty(batch, queries, heads, dim)


@contextmanager
def full_attention_installed(model: PreTrainedModel, layers: Sequence[AttentionLayer]) -> Iterator[None]:
    """Route a model's attention through this module within a block, over a `StaticCache`.

    No mask function is registered, so transformers builds no mask at all.

    Args:
        model: a causal language model.
        layers: its attention layers, all of which see the whole context.
    """
    previous = model.config._attn_implementation
    AttentionInterface.register(IMPLEMENTATION, _attention_forward)
    model.set_attn_implementation(IMPLEMENTATION)
    host.tokens, host.first, host.backend = 0, layers[0].index, None
    try:
        yield
    finally:
        model.set_attn_implementation(previous)


def choose_backend(layer: AttentionLayer, key: Tensor, value: Tensor, tokens: int) -> str:
    """Measure SDPA's backends on a decode step of one layer and use the fastest from now on.

    Args:
        layer: gives the number of query heads.
        key: (batch, KV heads, slots, head_dim), its cached keys.
        value: the same shape.
        tokens: filled slots that the step will see.

    Returns:
        the backend's name; `auto` on the CPU, where SDPA chooses.
    """
    host.backend = None
    if key.device.type != "cuda":
        return "auto"
    query = torch.randn(key.shape[0], layer.heads, 1, layer.head_dim, dtype=key.dtype, device=key.device)
    seconds: dict[SDPBackend, float] = {}
    for backend in DECODE_BACKENDS:

        def attend(backend: SDPBackend = backend) -> None:
            with sdpa_kernel(backend):
                full_attention(query, key[:, :, :tokens], value[:, :, :tokens], Softmax(), "sdpa")

        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # SDPA explains at length why a backend does not fit
                attend()
            seconds[backend] = time_runs(capture_graph(attend, key.device), key.device, repeats=5, warmup=2).median
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:  # it has no kernel for this shape or type
            continue
    if not seconds:
        return "auto"
    host.backend = min(seconds, key=lambda backend: seconds[backend])
    return host.backend.name.lower().removesuffix("_attention")


def _attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **unused: Any,
) -> tuple[Tensor, None]:
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return filled_attention(query, key, value, scale, module.layer_idx == host.first), None
