"""What streaming heads attend with on GPUs, in vLLM's engine on the CPU, its kernels in Triton's interpreter."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from duo_id import HeadMask, HeadSpans
from duo_id.common.errors import UserError
from tests.vllm.engine.cases import BLOCK, answers, load, save_tiny, says, served, some_prompts, tokens

BATCH = some_prompts(300, 20, 90, 5)  # beyond the window, within it, and in chunks of 128 beside others' decode steps


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Streaming heads attend as on GPUs; the most queries of a request in each launch."""
    from duo_id.vllm import backend_gpu, layers

    found, attend = [], backend_gpu.paged_attention

    def watched(*given: object) -> None:
        found.append(given[10])
        attend(*given)

    monkeypatch.setattr(layers, "streaming_backend", lambda: backend_gpu.PagedBackend)
    monkeypatch.setattr(backend_gpu, "paged_attention", watched)
    return found


def test_a_batch_says_what_duo_attention_says(tmp_path: Path, launches: list[int]) -> None:
    model = load(save_tiny("llama", tmp_path, num_hidden_layers=2))
    mask = HeadMask(torch.tensor([[1, 0, 1, 0], [0, 0, 0, 1]]).bool(), 16, 40)
    expected = answers(model, mask, BATCH, new=8)
    assert expected != answers(model, None, BATCH, new=8)
    with served(tmp_path, mask, max_num_batched_tokens=128) as engine:
        assert tokens(says(engine, BATCH, new=8)) == expected
    assert launches.count(1) >= 5 * 7, "decode steps of five streaming heads"
    assert max(launches) > 64


def test_heads_have_windows_of_their_own_and_scores_a_soft_cap(tmp_path: Path, launches: list[int]) -> None:
    model = load(save_tiny("gemma2", tmp_path))
    rows = [[-1] * 4, [8, -1, 60, 8], [-1] * 4, [-1, 30, 8, 100]]
    spans = HeadSpans(torch.tensor(rows), 5, (1, 3))
    expected = answers(model, spans, BATCH[:3], new=4)
    with served(tmp_path, spans, max_num_batched_tokens=128) as engine:
        assert tokens(says(engine, BATCH[:3], new=4)) == expected
    assert launches


def test_the_platform_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.platforms import current_platform

    from duo_id.vllm import layers
    from duo_id.vllm.backend_gpu import PagedBackend

    assert layers.streaming_backend().get_name() == "CPU_ATTN"
    monkeypatch.setattr(type(current_platform), "is_cuda", lambda self: True)
    monkeypatch.setattr(type(current_platform), "has_device_capability", lambda *given: True)
    assert layers.streaming_backend() is PagedBackend
    monkeypatch.setattr(type(current_platform), "has_device_capability", lambda *given: False)
    with pytest.raises(UserError, match=r"^a head mask is served on GPUs of compute capability 8.0 and above"):
        layers.streaming_backend()


def test_a_step_keeps_the_tensors_that_a_captured_graph_reads() -> None:
    """vLLM writes the next step into them; one workspace serves all steps, and the largest that is captured."""
    from vllm.v1.attention.backend import AttentionCGSupport

    from duo_id.vllm.backend_gpu import PagedMetadataBuilder
    from duo_id.vllm.spec import SinkWindowSpec

    spec = SinkWindowSpec(
        block_size=BLOCK, num_kv_heads=1, head_size=64, head_size_v=64, dtype=torch.bfloat16, sliding_window=8,
        sink_size=4,
    )  # fmt: skip
    heads = {f"layers.{layer}.kv0": SimpleNamespace(num_heads=4) for layer in range(2)}
    config = SimpleNamespace(
        compilation_config=SimpleNamespace(static_forward_context=heads, max_cudagraph_capture_size=24),
        scheduler_config=SimpleNamespace(max_num_seqs=20),
    )
    builder = PagedMetadataBuilder(spec, list(heads), config, torch.device("cpu"))
    step = SimpleNamespace(
        num_reqs=3,
        block_table_tensor=torch.zeros(8, 5, dtype=torch.int32),
        query_start_loc=torch.arange(9, dtype=torch.int32),
        seq_lens=torch.ones(8, dtype=torch.int32),
        max_query_len=1,
    )
    first, captured = builder.build(0, step), builder.build_for_cudagraph_capture(step)
    for built in (first, captured):
        assert built.table.data_ptr() == step.block_table_tensor.data_ptr()
        assert built.starts.data_ptr() == step.query_start_loc.data_ptr()
        assert built.lengths.data_ptr() == step.seq_lens.data_ptr()
        assert (len(built.table), len(built.starts), len(built.lengths), built.longest) == (3, 4, 3, 1)
        assert built.space is builder.space
    assert (first.window.sink_size, first.window.recent_size) == (4, 8)
    assert builder.space.arrived.numel() == 24
    assert builder.space.partial.numel() >= 24 * 4 * (64 + 2)
    support = PagedMetadataBuilder.get_cudagraph_support(config, spec)
    assert support == AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE


@pytest.mark.parametrize(("device", "warned"), [("cpu", 0), ("cuda", 1)], ids=["cpu", "cuda"])
def test_the_log_says_that_gpus_were_not_tested(device: str, warned: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.engine.arg_utils import EngineArgs
    from vllm.platforms import current_platform

    from duo_id.vllm import plugin
    from tests.vllm.test_limits import SPANS, config

    said: list[str] = []
    monkeypatch.setattr(EngineArgs, "create_engine_config", lambda self: config())
    monkeypatch.setattr(type(current_platform), "device_name", device)
    monkeypatch.setattr(plugin.logger, "warning", said.append)
    plugin.install(SPANS)
    try:
        EngineArgs.create_engine_config(None)
    finally:
        plugin.remove()
    assert len(said) == warned
