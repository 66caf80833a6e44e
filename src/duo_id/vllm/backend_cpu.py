"""vLLM's attention backend for streaming heads on CPUs: what a step reads is planned once for all heads of a group."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from vllm.v1.attention.backend import AttentionMetadataBuilder
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend, CPUAttentionBackendImpl

from duo_id.attention.softmax import Softmax
from duo_id.attention.window import Window
from duo_id.vllm.paged import Plan, attend, make_plan, write


@dataclass
class StreamingMetadata:
    """What vLLM hands to each streaming head in a step."""

    plan: Plan


class StreamingMetadataBuilder(AttentionMetadataBuilder):
    """Plans a step for a cache group of streaming heads."""

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: Any) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self.window = Window(kv_cache_spec.sink_size, kv_cache_spec.sliding_window)

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> StreamingMetadata:
        """The plan of the step whose batch `common_attn_metadata` describes."""
        requests = common_attn_metadata.num_reqs
        starts = common_attn_metadata.query_start_loc[: requests + 1].tolist()
        lengths = common_attn_metadata.seq_lens[:requests].tolist()
        table = common_attn_metadata.block_table_tensor[:requests].long()
        return StreamingMetadata(make_plan(self.window, self.kv_cache_spec.block_size, starts, lengths, table))


class StreamingImpl(CPUAttentionBackendImpl):
    """The attention of one streaming KV head."""

    def do_kv_cache_update(
        self, layer: Any, key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor
    ) -> None:
        """Store the new tokens, in the order in which `forward` reads them: vLLM's own kernels permute keys."""
        write(kv_cache, key, value, slot_mapping)

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: StreamingMetadata | None,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """Attention of the new tokens, (tokens, heads, head_dim), written to `output`."""
        assert output_scale is None
        assert output_block_scale is None
        if attn_metadata is not None:  # else vLLM measures its memory, and there is no cache yet
            softmax = Softmax(self.scale, self.logits_soft_cap or None)
            attend(attn_metadata.plan, query, kv_cache, softmax, output)
        return output


class StreamingBackend(CPUAttentionBackend):
    """What makes a layer of vLLM a streaming head."""

    @staticmethod
    def get_impl_cls() -> type[StreamingImpl]:
        """Its attention."""
        return StreamingImpl

    @staticmethod
    def get_builder_cls() -> type[StreamingMetadataBuilder]:
        """Its plans."""
        return StreamingMetadataBuilder
