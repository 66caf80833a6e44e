"""vLLM under a mask says what `duo_attention` says."""

from pathlib import Path

import pytest
import torch

from duo_id import HeadSpans
from tests.vllm.engine.cases import (
    FAMILIES,
    PROMPTS,
    alternating,
    answers,
    load,
    save_tiny,
    says,
    served,
    some_prompts,
    tokens,
)

BATCH = some_prompts(*PROMPTS)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_says_what_duo_attention_says(family: str, tmp_path: Path) -> None:
    """Prompts beyond 512 tokens come in chunks; sliding-window layers keep their own window."""
    model = load(save_tiny(family, tmp_path))
    mask = alternating((1, 3) if FAMILIES[family] else None)
    expected, full = answers(model, mask, BATCH), answers(model, None, BATCH)
    assert [a != b for a, b in zip(expected, full, strict=True)].count(True) >= 3, "the mask changes nothing"
    with served(tmp_path, mask) as engine:
        assert tokens(says(engine, BATCH)) == expected


def test_heads_have_windows_of_different_sizes(tmp_path: Path) -> None:
    model = load(save_tiny("llama", tmp_path))
    spans = HeadSpans(torch.tensor([[-1, 16, 200, 16], [16, -1, 16, 200], [200, 16, -1, 1], [-1, -1, 200, 16]]), 5)
    expected = answers(model, spans, BATCH)
    assert expected != answers(model, HeadSpans(spans.spans.where(spans.spans < 100, -1), 5), BATCH)
    with served(tmp_path, spans) as engine:
        assert tokens(says(engine, BATCH)) == expected


def test_all_heads_stream_or_none(tmp_path: Path) -> None:
    model = load(save_tiny("llama", tmp_path))
    for span in (-1, 40):
        spans = HeadSpans(torch.full((4, 4), span), sink_size=4)
        with served(tmp_path, spans) as engine:
            assert tokens(says(engine, BATCH)) == answers(model, spans, BATCH)


def test_the_engine_is_itself_again_without_a_mask(tmp_path: Path) -> None:
    model = load(save_tiny("llama", tmp_path))
    with served(tmp_path, alternating()):
        pass
    with served(tmp_path, None) as engine:
        assert tokens(says(engine, BATCH)) == answers(model, None, BATCH)


def test_a_compiled_model_says_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path / "cache"))  # nothing compiled before
    model = load(save_tiny("llama", tmp_path / "model", num_hidden_layers=1))
    spans = HeadSpans(torch.tensor([[64, -1, -1, 64]]), sink_size=32)
    with served(tmp_path / "model", spans, enforce_eager=False) as engine:
        assert tokens(says(engine, BATCH)) == answers(model, spans, BATCH)


def test_bfloat16_stays_close(tmp_path: Path) -> None:
    """Its kernels order keys otherwise; log-probabilities are those of the float32 model, to its precision."""
    model = load(save_tiny("llama", tmp_path))
    with served(tmp_path, alternating(), dtype="bfloat16") as engine:
        outputs = says(engine, BATCH, new=4, logprobs=0)
    for prompt, output in zip(BATCH, outputs, strict=True):
        said = list(output.outputs[0].token_ids)
        logits = logits_of(model, prompt + said)[len(prompt) - 1 : -1]
        expected = logits.log_softmax(-1)[range(len(said)), said]
        given = torch.tensor(
            [step[token].logprob for step, token in zip(output.outputs[0].logprobs, said, strict=True)]
        )
        torch.testing.assert_close(given, expected, rtol=0, atol=0.15)


def logits_of(model: torch.nn.Module, sequence: list[int]) -> torch.Tensor:
    """Logits (tokens, words) under the alternating mask."""
    import duo_id

    with torch.no_grad(), duo_id.duo_attention(model, alternating()):
        return model(torch.tensor([sequence]), use_cache=False).logits[0]
