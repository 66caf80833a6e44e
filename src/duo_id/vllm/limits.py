"""Which engines the plug-in serves under: what it cannot do right is refused before a model is loaded."""

import os
from typing import Any

from duo_id.common.errors import UserError, check
from duo_id.patterns.spans import HeadSpans


def check_servable(config: Any, spans: HeadSpans, device: str) -> None:
    """Raise a `UserError` unless an engine can serve a model under a mask.

    Args:
        config: vLLM's configuration of the engine, a `VllmConfig`.
        spans: how far each head sees.
        device: of vLLM's platform, such as `cpu`.
    """
    model, parallel, cache = config.model_config, config.parallel_config, config.cache_config
    check(
        device in ("cpu", "cuda"),
        f"a head mask is served on CPUs and on NVIDIA GPUs, and this vLLM runs on {device}: streaming heads have no "
        "kernel there",
    )
    check(not model.use_mla, f"{model.model} has latent attention (MLA), which has no KV heads to serve under a mask")
    kinds = {
        "layers of linear attention": model.is_hybrid,
        "no attention": model.is_attention_free,
        "an encoder": model.is_encoder_decoder,
        "tokens that see images which follow them": model.is_mm_prefix_lm,
        "tokens that see others which follow them": model.is_diffusion,
    }
    for kind, has in kinds.items():
        check(not has, f"{model.model} has {kind}: such models are not served under a head mask")
    spans.check_fits(model.get_total_num_hidden_layers(), model.get_total_num_kv_heads(), model.model)
    for name in ("pipeline", "decode_context", "prefill_context"):
        size = getattr(parallel, f"{name}_parallel_size", 1)
        option = f"--{name.replace('_', '-')}-parallel-size"
        check(size == 1, f"{option}={size}: a head mask is served by tensor-parallel workers alone, give {option} 1")
    dtype = str(model.dtype).removeprefix("torch.")
    check(
        cache.cache_dtype in ("auto", dtype),
        f"--kv-cache-dtype={cache.cache_dtype}: streaming heads read numbers of the model's type alone, give auto",
    )
    wanted = {
        "VLLM_BATCH_INVARIANT: how streaming heads sum up depends on the batch": (
            os.environ.get("VLLM_BATCH_INVARIANT", "0") != "0"
        ),
        "--enable-dbo, --ubatch-size: it was not tested with parts of a batch side by side": parallel.use_ubatching,
        "--speculative-config: streaming heads keep no blocks for drafts that are rejected": config.speculative_config,
        "--kv-transfer-config: connectors do not know the blocks of streaming heads": config.kv_transfer_config,
        "--disable-hybrid-kv-cache-manager: without it streaming heads would keep all blocks": (
            config.scheduler_config.disable_hybrid_kv_cache_manager
        ),
        "--kv-sharing-fast-prefill: it skips layers that hold keys of others": cache.kv_sharing_fast_prefill,
    }
    for reason, given in wanted.items():
        if given:
            raise UserError(f"{reason}: leave it out under a head mask")
