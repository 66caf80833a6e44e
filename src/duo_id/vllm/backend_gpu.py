"""vLLM's attention backend for streaming heads on NVIDIA GPUs: a step is two launches of our kernels for each head."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionImpl,
    AttentionMetadataBuilder,
    MultipleOf,
)

from duo_id.attention.kernels.paged import Workspace, paged_attention, store, workspace
from duo_id.attention.window import Window


@dataclass
class PagedMetadata:
    """What vLLM hands to each streaming head in a step.

    Attributes:
        window: of the heads.
        table: (requests, blocks) block table.
        starts: (requests + 1,) of each request's queries in the batch, and the end of the last one's.
        lengths: (requests,) of each request's context, with the new tokens.
        longest: the most queries that a request has.
        space: of the launches, which follow one another.
    """

    window: Window
    table: Tensor
    starts: Tensor
    lengths: Tensor
    longest: int
    space: Workspace


class PagedMetadataBuilder(AttentionMetadataBuilder):
    """Hands on a step's tensors, as they are: nothing waits for the device, and a captured step finds them again."""

    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: Any) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self.window = Window(kv_cache_spec.sink_size, kv_cache_spec.sliding_window)
        layers, compilation = vllm_config.compilation_config.static_forward_context, vllm_config.compilation_config
        group = max((layers[name].num_heads for name in layer_names), default=1)  # none: a rank without such heads
        requests = max(vllm_config.scheduler_config.max_num_seqs, compilation.max_cudagraph_capture_size or 0)
        self.space = workspace(requests, 1, group, kv_cache_spec.head_size, device)

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> PagedMetadata:
        """The step whose batch `common_attn_metadata` describes."""
        requests = common_attn_metadata.num_reqs
        return PagedMetadata(
            self.window,
            common_attn_metadata.block_table_tensor[:requests],
            common_attn_metadata.query_start_loc[: requests + 1],
            common_attn_metadata.seq_lens[:requests],
            common_attn_metadata.max_query_len,
            self.space,
        )


class PagedImpl(AttentionImpl):
    """The attention of one streaming KV head; the arguments are those of vLLM's implementations."""

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = "decoder",
        kv_sharing_target_layer_name: str | None = None,
    ) -> None:
        self.num_heads, self.head_size, self.num_kv_heads = num_heads, head_size, num_kv_heads
        self.scale, self.softcap, self.kv_cache_dtype = float(scale), logits_soft_cap or None, kv_cache_dtype

    def do_kv_cache_update(
        self, layer: Any, key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor
    ) -> None:
        """Store the new tokens."""
        store(kv_cache, key, value, slot_mapping)

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: PagedMetadata | None,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """Attention of the new tokens, (tokens, heads, head_dim), written to `output`."""
        assert output_scale is None
        assert output_block_scale is None
        if (step := attn_metadata) is None:  # vLLM measures its memory, and there is no cache yet
            return output.zero_()
        paged_attention(
            query,
            kv_cache,
            step.table,
            step.starts,
            step.lengths,
            output,
            self.scale,
            step.window.sink_size,
            step.window.recent_size,
            self.softcap,
            step.longest,
            step.space,
        )
        return output


class PagedBackend(AttentionBackend):
    """What makes a layer of vLLM a streaming head, with a cache in any layout."""

    forward_includes_kv_cache_update = False
    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16, torch.float32]

    @staticmethod
    def get_name() -> str:
        """The name that vLLM has for what others bring."""
        return "CUSTOM"

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[int | MultipleOf]:
        """Those of vLLM's own kernels, so that none is split."""
        return [MultipleOf(16)]

    @staticmethod
    def get_impl_cls() -> type[PagedImpl]:
        """Its attention."""
        return PagedImpl

    @staticmethod
    def get_builder_cls() -> type[PagedMetadataBuilder]:
        """Its steps."""
        return PagedMetadataBuilder
