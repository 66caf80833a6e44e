"""Attention layers of vLLM, split: each KV head is a layer of its own, with a cache of its own.

Heads of one layer then have pages of equal size whatever they keep, which is what vLLM's allocator needs to give them
different numbers of blocks. Models stay as they are: where one constructs vLLM's `Attention`, it gets a
`SplitAttention`.
"""

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.models.utils import extract_layer_index
from vllm.platforms import current_platform
from vllm.v1.attention.backend import AttentionBackend, AttentionType

from duo_id.common.errors import UserError, check
from duo_id.patterns.fields import ALL
from duo_id.patterns.spans import HeadSpans
from duo_id.vllm.spec import SinkWindowSpec

HEAD = ".kv"  # between the name of a layer and the index of a KV head
UNSERVED = {
    "alibi_slopes": "ALiBi",
    "kv_sharing_target_layer_name": "keys and values of another layer",
    "sinks": "sinks",
}


def streaming_backend() -> type[AttentionBackend]:
    """What streaming heads attend with on this platform."""
    if current_platform.is_cuda():
        check(
            current_platform.has_device_capability(80),
            "a head mask is served on GPUs of compute capability 8.0 and above, and this one is older",
        )
        from duo_id.vllm.backend_gpu import PagedBackend

        return PagedBackend
    from duo_id.vllm.backend_cpu import StreamingBackend

    return StreamingBackend


class WholeHead(Attention):
    """A KV head with its query heads that keeps what the model's own attention keeps."""


class StreamingHead(Attention):
    """A KV head with its query heads that keeps the sink and a window."""

    def __init__(self, sink_size: int, recent_size: int, **given: Any) -> None:
        super().__init__(attn_backend=streaming_backend(), **given)
        check(
            self.kv_cache_dtype in ("auto", str(torch.get_default_dtype()).removeprefix("torch.")),
            f"{self.layer_name} has a cache in {self.kv_cache_dtype}, as the checkpoint says: give --kv-cache-dtype",
        )
        self.sink_size, self.recent_size = sink_size, recent_size

    def get_kv_cache_spec(self, vllm_config: Any) -> SinkWindowSpec:
        """The cache that this head needs."""
        whole = super().get_kv_cache_spec(vllm_config)
        return SinkWindowSpec(
            block_size=whole.block_size,
            num_kv_heads=1,
            head_size=whole.head_size,
            head_size_v=whole.head_size_v,
            dtype=whole.dtype,
            sliding_window=self.recent_size,
            sink_size=self.sink_size,
        )


def heads_of_rank(kv_heads: int, rank: int, ranks: int) -> range:
    """The KV heads of a tensor-parallel rank; where there are more ranks than heads, several have the same one."""
    return range(rank * kv_heads // ranks, rank * kv_heads // ranks + max(1, kv_heads // ranks))


class SplitAttention(nn.Module):
    """An attention layer of a model, as one layer per KV head.

    Args:
        spans: of the whole model.
        given: the arguments with which the model constructs vLLM's `Attention`, by name.
    """

    def __init__(self, spans: HeadSpans, given: dict[str, Any]) -> None:
        super().__init__()
        given = dict(given)
        prefix, heads = given.pop("prefix"), given.pop("num_heads")
        kv_heads = given.pop("num_kv_heads", None) or heads
        layer = extract_layer_index(prefix)
        layers, expected = spans.spans.shape
        check(layer < layers, f"{prefix} is beyond the {layers} layers of the head mask")
        row = spans.spans[layer].tolist()
        _check_layer(prefix, given, spans, any(span != ALL for span in row))
        own = heads_of_rank(expected, get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size())
        check(kv_heads == len(own), f"{prefix} has {kv_heads} KV heads where the head mask has {len(own)}")
        self.kv_heads = kv_heads
        self.heads = nn.ModuleList()
        for head in own:  # named as in the whole model, so that vLLM takes the ranks' heads for different layers
            span = row[head]
            part = given | {"num_heads": heads // kv_heads, "num_kv_heads": 1, "prefix": f"{prefix}{HEAD}{head}"}
            self.heads.append(WholeHead(**part) if span == ALL else StreamingHead(spans.sink_size, span, **part))

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        output_shape: torch.Size | None = None,
        output_dtype: torch.dtype | None = None,
    ) -> Tensor:
        """Attention of the new tokens: (tokens, width) of queries, keys and values to (tokens, width)."""
        parts = [x.reshape(x.shape[0], self.kv_heads, -1).unbind(1) for x in (query, key, value)]
        found = [
            head(*(x.contiguous() for x in part), output_dtype=output_dtype)
            for head, *part in zip(self.heads, *parts, strict=True)
        ]
        joined = torch.cat(found, -1)
        return joined if output_shape is None else joined.view(output_shape)


def _check_layer(prefix: str, given: dict[str, Any], spans: HeadSpans, streams: bool) -> None:
    """Raise a `UserError` unless a layer with these arguments can be split, with heads that stream where they shall."""
    cache = given.get("cache_config")
    window = given.get("per_layer_sliding_window") or (cache and cache.sliding_window)
    if streams:
        check(
            not window, f"{prefix} has a sliding window of {window} tokens: its heads cannot stream, as the mask says"
        )
        width = given.get("head_size_v") or given["head_size"]
        check(width == given["head_size"], f"{prefix} has values of another width than keys: its heads cannot stream")
        for name, meaning in UNSERVED.items():
            check(given.get(name) is None, f"{prefix} has {meaning}, with which vLLM cannot serve streaming heads yet")
    elif window and bool((spans.spans[list(spans.gated_layers)] == window).all()):
        raise UserError(  # vLLM would give both one block table, and the model's own layers have no sink
            f"{window} tokens are the window of {prefix} and of all streaming heads: give another recent_size, or a "
            "mask with a retrieval head"
        )


def split_layers(spans: HeadSpans | None) -> None:
    """From here on, let models get a `SplitAttention` where they construct vLLM's `Attention`; None: no longer.

    Its subclasses, for encoders and for other kinds of attention, stay as they are.
    """
    signature = inspect.signature(Attention.__init__)

    def construct(cls: type, *arguments: Any, **named: Any) -> Any:
        if spans is None or cls is not Attention or not (arguments or named):  # copies have no arguments
            return object.__new__(cls)
        given = signature.bind(None, *arguments, **named).arguments
        given |= given.pop("extra_impl_args", {})
        given.pop("self")
        if given.get("attn_type", AttentionType.DECODER) != AttentionType.DECODER:
            return object.__new__(cls)
        return SplitAttention(spans, given)  # no instance of `cls`, so Python does not call its __init__

    Attention.__new__ = construct  # it stays: Python keeps a class that lost its own from constructing anything


def check_arrived(spans: HeadSpans, specs: dict[str, Any]) -> None:
    """Raise a `UserError` unless every streaming head of a mask is among the layers of a model.

    Args:
        spans: of the model.
        specs: the cache of each attention layer that vLLM found, by name.
    """
    found = set()
    for name in (name for name, spec in specs.items() if isinstance(spec, SinkWindowSpec)):
        layer, _, head = name.rpartition(HEAD)
        found.add((extract_layer_index(layer), int(head)))
    expected = {(layer, head) for layer, head in (spans.spans != ALL).nonzero().tolist()}
    if missing := sorted({layer for layer, _ in expected - found}):
        raise UserError(
            f"layers {missing} do not go through vLLM's Attention, so their heads would not stream: give a mask "
            "without them, or serve with another model implementation (--model-impl)"
        )
