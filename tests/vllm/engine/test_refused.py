"""What the engine itself, its models and its command are refused."""

from pathlib import Path
from typing import Any

import pytest
import torch

from duo_id import HeadSpans
from duo_id.common.errors import UserError
from tests.vllm.engine.cases import HYBRID, alternating, save_tiny, served


def refused(message: str, folder: Path, heads: Any, **options: Any) -> None:
    with pytest.raises(UserError, match=message) as error, served(folder, heads, **options):
        pass
    assert "\n" not in str(error.value)


def test_an_engine_that_cannot_serve_is_refused_before_it_loads(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path)
    (tmp_path / "model.safetensors").unlink()
    refused(
        "^--kv-cache-dtype=fp8: streaming heads read numbers",
        tmp_path,
        alternating(),
        kv_cache_dtype="fp8",
    )
    other = HeadSpans(torch.full((3, 4), 8), 4)
    refused(f"for 3 layers x 4 KV heads, but {tmp_path} has 4 layers x 4 KV heads$", tmp_path, other)


def test_heads_of_sliding_window_layers_do_not_stream(tmp_path: Path) -> None:
    save_tiny("gemma3_text", tmp_path / "hybrid")
    refused(r"model.layers.0.self_attn.attn has a sliding window of 48 tokens", tmp_path / "hybrid", alternating())
    save_tiny("mistral", tmp_path / "windowed", sliding_window=64)
    refused(r"model.layers.0.self_attn.attn has a sliding window of 64 tokens", tmp_path / "windowed", alternating())


def test_one_window_for_two_kinds_of_layers_is_refused(tmp_path: Path) -> None:
    """vLLM would take all layers for one kind, and free the sink."""
    save_tiny("gemma3_text", tmp_path)
    spans = HeadSpans(torch.tensor([[-1] * 4, [HYBRID["sliding_window"]] * 4] * 2), 4, (1, 3))
    refused("^48 tokens are the window of model.layers.0.self_attn.attn and of all streaming heads: ", tmp_path, spans)


def test_streaming_heads_that_never_arrive_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a model whose layers are of another class than vLLM's `Attention`."""
    import vllm.model_executor.models.llama as models
    from vllm.model_executor.layers.attention import Attention

    monkeypatch.setattr(models, "Attention", type("OtherAttention", (Attention,), {}))
    refused(r"^layers \[0, 1, 2, 3\] do not go through vLLM's Attention", save_tiny("llama", tmp_path), alternating())


def test_the_plugin_must_be_found_by_other_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    import duo_id.vllm

    monkeypatch.setenv("VLLM_PLUGINS", "another")
    with pytest.raises(UserError, match=r"^VLLM_PLUGINS=another leaves out duo_id: add it$"):
        duo_id.vllm.register(alternating())
    monkeypatch.delenv("VLLM_PLUGINS")
    monkeypatch.setattr("duo_id.vllm.plugin.entry_points", lambda group: [])
    with pytest.raises(UserError, match=r"^vLLM's processes do not find the plug-in: install duo_id"):
        duo_id.vllm.register(alternating())


def test_a_wrong_variable_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    from duo_id.vllm.plugin import plugin

    monkeypatch.setenv("DUO_ID_HEADS", "nowhere@0.5")
    with pytest.raises(UserError, match=r"^DUO_ID_HEADS=nowhere@0.5: no head pattern 'nowhere'"):
        plugin()


@pytest.mark.parametrize("name", ["alibi_slopes", "sinks", "kv_sharing_target_layer_name"])
def test_layers_with_more_than_a_softmax_are_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from duo_id.vllm import layers
    from duo_id.vllm.layers import SplitAttention

    monkeypatch.setattr(layers, "get_tensor_model_parallel_rank", lambda: 0)
    monkeypatch.setattr(layers, "get_tensor_model_parallel_world_size", lambda: 1)

    spans = HeadSpans(torch.tensor([[8, -1]]), 4)
    given = {"num_heads": 4, "head_size": 32, "scale": 1.0, "num_kv_heads": 2, "prefix": "layers.0.attn", name: 1.0}
    with pytest.raises(UserError, match=r"^layers.0.attn has .*, with which vLLM cannot serve streaming heads yet$"):
        SplitAttention(spans, given)
    with pytest.raises(UserError, match=r"^layers.1.attn is beyond the 1 layers of the head mask$"):
        SplitAttention(spans, given | {"prefix": "layers.1.attn"})
    plain = {key: value for key, value in given.items() if key != name}
    with pytest.raises(UserError, match=r"^layers.0.attn has 4 KV heads where the head mask has 2$"):
        SplitAttention(spans, plain | {"num_kv_heads": 4})
    with pytest.raises(
        UserError, match=r"^layers.0.attn has values of another width than keys: its heads cannot stream$"
    ):
        SplitAttention(spans, plain | {"head_size_v": 16})
