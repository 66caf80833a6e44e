"""The cache of streaming heads in vLLM: which blocks a request keeps, how many it may need, which are shared.

A request keeps the blocks that hold the sink and those that the window of its next query reaches into; all between
them go back to the pool while it runs. vLLM has this for windows without a sink, and the classes here add the sink.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vllm.utils.math_utils import cdiv
from vllm.v1.core.kv_cache_utils import resolve_block_hashes
from vllm.v1.core.single_type_kv_cache_manager import SlidingWindowManager
from vllm.v1.kv_cache_interface import SlidingWindowSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry


@dataclass(frozen=True, kw_only=True)
class SinkWindowSpec(SlidingWindowSpec):
    """The cache of a head that sees the first `sink_size` tokens and the latest `sliding_window`."""

    sink_size: int

    @property
    def sink_blocks(self) -> int:
        """Blocks that hold the sink."""
        return cdiv(self.sink_size, self.block_size)

    def max_admission_blocks_per_request(self, max_in_flight_tokens: int, max_model_len: int) -> int:
        """The most blocks that a request holds at once; vLLM reserves them before it starts."""
        window = super().max_admission_blocks_per_request(max_in_flight_tokens, max_model_len)
        return min(self.sink_blocks + window, cdiv(max_model_len, self.block_size))

    def is_uniform_with_collection(self, kv_cache_specs: dict[str, Any]) -> bool:
        """Whether all layers keep the same tokens, so that one block table serves them."""
        return all(
            isinstance(spec, SinkWindowSpec)
            and (spec.sliding_window, spec.sink_size) == (self.sliding_window, self.sink_size)
            for spec in kv_cache_specs.values()
        )


class SinkWindowManager(SlidingWindowManager):
    """The blocks of streaming heads, request by request."""

    def remove_skipped_blocks(
        self, request_id: str, processed_computed_tokens: int, num_prompt_tokens: int | None = None
    ) -> None:
        """Free the blocks between the sink and the window of the next query."""
        skipped = self.get_num_skipped_tokens(processed_computed_tokens) // self.block_size
        self._remove_blocks_in_range(request_id, self.kv_cache_spec.sink_blocks, skipped)

    def get_num_blocks_to_allocate(
        self, request_id: str, num_tokens: int, new_computed_blocks: Sequence[Any], *args: Any, **kwargs: Any
    ) -> int:
        """Blocks that a request takes from the pool; those of a shared sink among them while nobody holds them."""
        taken = super().get_num_blocks_to_allocate(request_id, num_tokens, new_computed_blocks, *args, **kwargs)
        if request_id in self.num_cached_block:
            return taken
        computed = args[0] if args else kwargs["total_computed_tokens"]
        skipped = self.get_num_skipped_tokens(computed) // self.block_size
        sink = new_computed_blocks[: min(skipped, self.kv_cache_spec.sink_blocks)]
        return taken + self._get_num_evictable_blocks(sink)

    def add_local_computed_blocks(
        self,
        request_id: str,
        new_computed_blocks: Sequence[Any],
        num_local_computed_tokens: int,
        num_external_computed_tokens: int,
    ) -> None:
        """Give a new request the blocks of a shared prefix: those of the sink and of the window."""
        super().add_local_computed_blocks(
            request_id, new_computed_blocks, num_local_computed_tokens, num_external_computed_tokens
        )
        blocks = self.req_to_blocks[request_id]
        computed = num_local_computed_tokens + num_external_computed_tokens
        skipped = self.get_num_skipped_tokens(computed) // self.block_size
        sink = new_computed_blocks[: min(skipped, self.kv_cache_spec.sink_blocks)]
        if self.enable_caching:
            self.block_pool.touch(sink)
        blocks[: len(sink)] = sink

    @classmethod
    def find_longest_cache_hit(
        cls,
        block_hashes: Any,
        max_length: int,
        kv_cache_group_ids: list[int],
        block_pool: Any,
        kv_cache_spec: SinkWindowSpec,
        drop_eagle_block: bool,
        alignment_tokens: int,
        **kwargs: Any,
    ) -> tuple[tuple[list[Any], ...], int]:
        """The longest prefix whose sink and whose window are both still in the pool."""
        hashes = resolve_block_hashes(block_hashes, block_pool.hash_block_size, kv_cache_spec.block_size)
        sink: list[list[Any]] = [[] for _ in kv_cache_group_ids]
        for index in range(min(kv_cache_spec.sink_blocks, max_length // kv_cache_spec.block_size)):
            cached = block_pool.get_cached_block(hashes[index], kv_cache_group_ids)
            if not cached:
                max_length = index * kv_cache_spec.block_size  # what remains lies in the sink, and all of it is needed
                break
            for blocks, block in zip(sink, cached, strict=True):
                blocks.append(block)
        found, length = super().find_longest_cache_hit(
            hashes,
            max_length,
            kv_cache_group_ids,
            block_pool,
            kv_cache_spec,
            drop_eagle_block,
            alignment_tokens,
            **kwargs,
        )
        for blocks, first in zip(found, sink, strict=True):
            blocks[: len(first)] = first[: len(blocks)]
        return found, length

    @classmethod
    def reachable_block_mask(
        cls,
        start_block: int,
        end_block: int,
        alignment_tokens: int | None,
        kv_cache_spec: SinkWindowSpec,
        **kwargs: Any,
    ) -> list[bool] | None:
        """Which blocks of a request can serve a later one; those of the sink always can."""
        mask = super().reachable_block_mask(start_block, end_block, alignment_tokens, kv_cache_spec, **kwargs)
        if mask is not None:
            for block in range(start_block, min(end_block, kv_cache_spec.sink_blocks)):
                mask[block - start_block] = True
        return mask


def register_spec() -> None:
    """Tell vLLM which manager the spec has, beside its own specs."""
    KVCacheSpecRegistry._ensure_registered()  # a registry that is not empty would suppress vLLM's own
    KVCacheSpecRegistry.register(SinkWindowSpec, SinkWindowManager, uniform_type_base_spec=SinkWindowSpec)
