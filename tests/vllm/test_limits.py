"""What the plug-in refuses, on stand-ins of vLLM's configuration."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from duo_id import HeadSpans
from duo_id.common.errors import UserError
from duo_id.vllm.limits import check_servable

SPANS = HeadSpans(torch.tensor([[4, -1]] * 3), sink_size=2)


def config(**changes: Any) -> SimpleNamespace:
    """vLLM's configuration of an engine that is served; `changes` by PART__FIELD."""
    model = {
        "model": "tiny",
        "dtype": torch.bfloat16,
        "use_mla": False,
        "is_hybrid": False,
        "is_attention_free": False,
        "is_encoder_decoder": False,
        "is_mm_prefix_lm": False,
        "is_diffusion": False,
        "get_total_num_hidden_layers": lambda: 3,
        "get_total_num_kv_heads": lambda: 2,
    }
    sizes = ("pipeline", "decode_context", "prefill_context")
    parts: dict[str, dict[str, Any]] = {
        "model_config": model,
        "parallel_config": {f"{size}_parallel_size": 1 for size in sizes} | {"use_ubatching": False},
        "cache_config": {"cache_dtype": "auto", "kv_sharing_fast_prefill": False},
        "scheduler_config": {"disable_hybrid_kv_cache_manager": False},
    }
    whole: dict[str, Any] = {"speculative_config": None, "kv_transfer_config": None}
    for name, value in changes.items():
        part, _, field = name.partition("__")
        owner = parts[part] if field else whole
        assert (field or part) in owner
        owner[field or part] = value
    return SimpleNamespace(**whole, **{name: SimpleNamespace(**fields) for name, fields in parts.items()})


def test_a_plain_engine_is_served() -> None:
    check_servable(config(), SPANS, "cpu")
    check_servable(config(), SPANS, "cuda")
    check_servable(config(cache_config__cache_dtype="bfloat16"), SPANS, "cpu")


REFUSED = {
    "latent": ({"model_config__use_mla": True}, r"^tiny has latent attention \(MLA\)"),
    "linear": ({"model_config__is_hybrid": True}, "^tiny has layers of linear attention: such models"),
    "no-attention": ({"model_config__is_attention_free": True}, "^tiny has no attention: "),
    "encoder": ({"model_config__is_encoder_decoder": True}, "^tiny has an encoder: "),
    "images": ({"model_config__is_mm_prefix_lm": True}, "^tiny has tokens that see images which follow them: "),
    "diffusion": ({"model_config__is_diffusion": True}, "^tiny has tokens that see others which follow them: "),
    "layers": (
        {"model_config__get_total_num_hidden_layers": lambda: 4},
        "for 3 layers x 2 KV heads, but tiny has 4 layers x 2 KV heads$",
    ),
    "heads": ({"model_config__get_total_num_kv_heads": lambda: 8}, "but tiny has 3 layers x 8 KV heads$"),
    "pipeline": (
        {"parallel_config__pipeline_parallel_size": 4},
        "^--pipeline-parallel-size=4: .* --pipeline-parallel-",
    ),
    "decode-context": ({"parallel_config__decode_context_parallel_size": 2}, "^--decode-context-parallel-size=2: "),
    "prefill-context": ({"parallel_config__prefill_context_parallel_size": 2}, "^--prefill-context-parallel-size=2: "),
    "codes": ({"cache_config__cache_dtype": "fp8_e5m2"}, "^--kv-cache-dtype=fp8_e5m2: .* give auto$"),
    "other-type": ({"cache_config__cache_dtype": "float16"}, "^--kv-cache-dtype=float16: .* give auto$"),
    "drafts": ({"speculative_config": object()}, "^--speculative-config: .*: leave it out under a head mask$"),
    "connector": ({"kv_transfer_config": object()}, "^--kv-transfer-config: "),
    "one-group": ({"scheduler_config__disable_hybrid_kv_cache_manager": True}, "^--disable-hybrid-kv-cache-manager: "),
    "halves": ({"parallel_config__use_ubatching": True}, "^--enable-dbo, --ubatch-size: "),
    "shared-keys": ({"cache_config__kv_sharing_fast_prefill": True}, "^--kv-sharing-fast-prefill: "),
}


@pytest.mark.parametrize(("changes", "message"), REFUSED.values(), ids=REFUSED)
def test_what_is_not_served_is_refused_by_name(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        check_servable(config(**changes), SPANS, "cpu")
    assert "\n" not in str(error.value)


def test_sums_that_do_not_depend_on_the_batch_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "0")
    check_servable(config(), SPANS, "cuda")
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
    with pytest.raises(UserError, match=r"^VLLM_BATCH_INVARIANT: .*: leave it out under a head mask$"):
        check_servable(config(), SPANS, "cuda")


@pytest.mark.parametrize("device", ["rocm", "xpu", "tpu"])
def test_other_devices_are_refused(device: str) -> None:
    message = f"^a head mask is served on CPUs and on NVIDIA GPUs, and this vLLM runs on {device}: "
    with pytest.raises(UserError, match=message):
        check_servable(config(), SPANS, device)
