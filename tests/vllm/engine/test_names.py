"""The names of vLLM that the plug-in builds on: where a release changes one, this says which."""

import inspect
from importlib import import_module

import pytest

from tests.vllm.engine.cases import vllm

VERSION = "0.32.0"
# Where a name lives, and the parameters by which it is called or overridden (None: a class or a value).
NAMES: dict[str, str | None] = {
    "vllm.config.parallel:ParallelConfig.use_ubatching": None,
    "vllm.distributed:get_tensor_model_parallel_rank": "",
    "vllm.distributed:get_tensor_model_parallel_world_size": "",
    "vllm.engine.arg_utils:EngineArgs.create_engine_config": "self usage_context headless",
    "vllm.model_executor.layers.attention:Attention": None,
    "vllm.model_executor.layers.attention:Attention.__init__": (
        "self num_heads head_size scale num_kv_heads alibi_slopes use_alibi_sqrt cache_config quant_config "
        "logits_soft_cap per_layer_sliding_window prefix attn_type kv_sharing_target_layer_name "
        "mm_prefix_clamp_sliding_window attn_backend head_size_v extra_impl_args"
    ),
    "vllm.model_executor.layers.attention:Attention.forward": "self query key value output_shape output_dtype",
    "vllm.model_executor.layers.attention:Attention.get_kv_cache_spec": "self vllm_config",
    "vllm.model_executor.models.utils:extract_layer_index": "layer_name num_attn_module",
    "vllm.platforms:current_platform.device_name": None,
    "vllm.platforms:current_platform.has_device_capability": "capability device_id",
    "vllm.platforms:current_platform.is_cuda": "",
    "vllm.utils.math_utils:cdiv": "a b",
    "vllm.v1.attention.backend:AttentionBackend.forward_includes_kv_cache_update": None,
    "vllm.v1.attention.backend:AttentionBackend.get_builder_cls": "",
    "vllm.v1.attention.backend:AttentionBackend.get_impl_cls": "",
    "vllm.v1.attention.backend:AttentionBackend.get_name": "",
    "vllm.v1.attention.backend:AttentionBackend.get_supported_kernel_block_sizes": "kv_cache_spec",
    "vllm.v1.attention.backend:AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE": None,
    "vllm.v1.attention.backend:AttentionImpl.__init__": (
        "self num_heads head_size scale num_kv_heads alibi_slopes sliding_window kv_cache_dtype logits_soft_cap "
        "attn_type kv_sharing_target_layer_name"
    ),
    "vllm.v1.attention.backend:AttentionImpl.forward": (
        "self layer query key value kv_cache attn_metadata output output_scale output_block_scale"
    ),
    "vllm.v1.attention.backend:AttentionMetadataBuilder.__init__": "self kv_cache_spec layer_names vllm_config device",
    "vllm.v1.attention.backend:AttentionMetadataBuilder.build": (
        "self common_prefix_len common_attn_metadata fast_build"
    ),
    "vllm.v1.attention.backend:AttentionMetadataBuilder._cudagraph_support": None,
    "vllm.v1.attention.backend:AttentionType.DECODER": None,
    "vllm.v1.attention.backend:MultipleOf": "base",
    "vllm.v1.attention.backends.registry:AttentionBackendEnum.CUSTOM": None,
    "vllm.v1.attention.backends.triton_attn:TritonAttentionImpl.do_kv_cache_update": (
        "self layer key value kv_cache slot_mapping"
    ),
    "vllm.v1.attention.backends.cpu_attn:CPUAttentionBackend.get_builder_cls": "",
    "vllm.v1.attention.backends.cpu_attn:CPUAttentionBackend.get_impl_cls": "",
    "vllm.v1.attention.backends.cpu_attn:CPUAttentionBackendImpl.do_kv_cache_update": (
        "self layer key value kv_cache slot_mapping"
    ),
    "vllm.v1.attention.backends.cpu_attn:CPUAttentionBackendImpl.forward": (
        "self layer query key value kv_cache attn_metadata output output_scale output_block_scale"
    ),
    "vllm.v1.core.block_pool:BlockPool.get_cached_block": "self block_hash kv_cache_group_ids",
    "vllm.v1.core.block_pool:BlockPool.touch": "self blocks",
    "vllm.v1.core.kv_cache_utils:_get_kv_cache_groups_uniform_page_size": "kv_cache_spec",
    "vllm.v1.core.kv_cache_utils:create_kv_cache_group_specs": "kv_cache_spec grouped_layer_names",
    "vllm.v1.core.kv_cache_utils:resolve_block_hashes": (
        "block_hashes hash_block_size block_size supports_fine_grained_hash_lookup alignment_tokens"
    ),
    "vllm.v1.core.single_type_kv_cache_manager:SlidingWindowManager._get_num_evictable_blocks": "blocks",
    "vllm.v1.core.single_type_kv_cache_manager:SlidingWindowManager._remove_blocks_in_range": (
        "self request_id first_block last_block"
    ),
    "vllm.v1.core.single_type_kv_cache_manager:SlidingWindowManager.add_local_computed_blocks": (
        "self request_id new_computed_blocks num_local_computed_tokens num_external_computed_tokens"
    ),
    "vllm.v1.core.single_type_kv_cache_manager:SlidingWindowManager.find_longest_cache_hit": (
        "block_hashes max_length kv_cache_group_ids block_pool kv_cache_spec drop_eagle_block alignment_tokens "
        "dcp_world_size pcp_world_size"
    ),
    "vllm.v1.core.single_type_kv_cache_manager:SlidingWindowManager.get_num_blocks_to_allocate": (
        "self request_id num_tokens new_computed_blocks total_computed_tokens num_local_computed_tokens "
        "num_tokens_main_model apply_admission_cap prefill_end"
    ),
    "vllm.v1.core.single_type_kv_cache_manager:SlidingWindowManager.get_num_skipped_tokens": "self num_computed_tokens",
    "vllm.v1.core.single_type_kv_cache_manager:SlidingWindowManager.reachable_block_mask": (
        "start_block end_block alignment_tokens kv_cache_spec use_eagle retention_interval reachable_boundaries "
        "dcp_world_size final_segment_end_block"
    ),
    "vllm.v1.core.single_type_kv_cache_manager:SlidingWindowManager.remove_skipped_blocks": (
        "self request_id processed_computed_tokens num_prompt_tokens"
    ),
    "vllm.v1.kv_cache_interface:SlidingWindowSpec.is_uniform_with_collection": "self kv_cache_specs",
    "vllm.v1.kv_cache_interface:SlidingWindowSpec.max_admission_blocks_per_request": (
        "self max_in_flight_tokens max_model_len"
    ),
    "vllm.v1.kv_cache_spec_registry:KVCacheSpecRegistry._ensure_registered": "vllm_config",
    "vllm.v1.kv_cache_spec_registry:KVCacheSpecRegistry.check_kv_cache_spec_registry": "kv_cache_spec",
    "vllm.v1.kv_cache_spec_registry:KVCacheSpecRegistry.register": (
        "kvcache_spec_cls manager_class uniform_type_base_spec"
    ),
}


def test_the_release_is_the_one_that_was_tested() -> None:
    assert vllm.__version__.partition("+")[0] == VERSION


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_what_it_was(name: str) -> None:
    module, _, path = name.partition(":")
    found = import_module(module)
    for part in path.split("."):
        assert hasattr(found, part), f"vLLM has no {name}"
        found = getattr(found, part)
    if (expected := NAMES[name]) is not None:
        assert list(inspect.signature(found).parameters) == expected.split(), f"vLLM calls {name} otherwise"


def test_a_layer_is_still_constructed_by_its_class() -> None:
    """`Attention.__new__` is what the plug-in replaces, so vLLM may not have one of its own."""
    from vllm.model_executor.layers.attention import Attention

    from duo_id.vllm.layers import split_layers

    new = vars(Attention).get("__new__")
    assert new is None or new.__module__ == split_layers.__module__
