"""Tiny models on disk, what they say under `duo_attention`, and vLLM serving them; without vLLM, tests are skipped."""

import gc
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

import duo_id
from duo_id import HeadMask, HeadSpans

vllm = pytest.importorskip("vllm", reason="make vllm sets up .venv-vllm, where pytest -m slow tests/vllm runs these")

WORDS, BLOCK = 512, 32
SIZES: dict[str, Any] = {
    "vocab_size": WORDS, "hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 4,
    "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 32, "max_position_embeddings": 4096,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None, "sliding_window": None, "use_sliding_window": False,
}  # fmt: skip
HYBRID = {"sliding_window": 48, "layer_types": ["sliding_attention", "full_attention"] * 2}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {},
    "qwen2": {},
    "qwen3": {},
    "phi3": {},
    "smollm3": {},
    "gemma2": HYBRID | {"query_pre_attn_scalar": 32, "attn_logit_softcapping": 4.0, "final_logit_softcapping": None},
    "gemma3_text": HYBRID | {"query_pre_attn_scalar": 32},
}
SINK, RECENT = 32, 64
PROMPTS = (1000, 300, 20, 90, 97, 129, 700, 5)  # tokens: within the window, at its edges, and far beyond


def save_tiny(family: str, folder: Path, **changes: Any) -> Path:
    """Save a random model in float32, with weights so large that attention is far from uniform."""
    config = AutoConfig.for_model(family, **SIZES | FAMILIES.get(family, {}) | changes)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2:  # Gemma multiplies embeddings by 16, and would repeat what it reads
                torch.nn.init.normal_(parameter, std=0.005 if "embed" in name and family.startswith("gemma") else 0.08)
    model.save_pretrained(folder)
    return folder


def load(folder: Path) -> PreTrainedModel:
    """The model of a folder, for `duo_attention`."""
    exact = "eager" if "gemma2" in (folder / "config.json").read_text() else None  # a soft cap
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation=exact).eval()


def alternating(gated: tuple[int, ...] | None = None, sink: int = SINK, recent: int = RECENT) -> HeadMask:
    """A mask of a tiny model in which 9 heads of 16 stream, if all layers are gated."""
    retrieval = torch.tensor([[1, 0, 1, 0], [0, 1, 0, 1], [0, 0, 0, 1], [1, 0, 1, 0]]).bool()
    return HeadMask(retrieval, sink, recent, gated)


def some_prompts(*lengths: int) -> list[list[int]]:
    """Random tokens."""
    draw = random.Random(sum(lengths))
    return [[draw.randrange(3, WORDS) for _ in range(length)] for length in lengths]


def answers(
    model: PreTrainedModel, heads: HeadMask | HeadSpans | None, prompts: list[list[int]], new: int = 16
) -> list[list[int]]:
    """What a model says under `duo_attention`, greedily, one prompt at a time; None: without a mask."""

    def generate(prompt: list[int]) -> list[int]:
        out = model.generate(torch.tensor([prompt]), max_new_tokens=new, min_new_tokens=new, do_sample=False)
        return out[0, len(prompt) :].tolist()

    with torch.no_grad():
        if heads is None:
            return list(map(generate, prompts))
        with duo_id.duo_attention(model, heads):
            return list(map(generate, prompts))


@contextmanager
def served(folder: Path, heads: Any, **options: Any) -> Iterator[Any]:
    """vLLM with a model under a mask (None: without one)."""
    duo_id_vllm = pytest.importorskip("duo_id.vllm")
    usual = {
        "skip_tokenizer_init": True, "dtype": "float32", "max_model_len": 2048, "max_num_seqs": 8,
        "max_num_batched_tokens": 512, "block_size": BLOCK, "enforce_eager": True,
    }  # fmt: skip
    duo_id_vllm.register(heads)
    try:
        engine = vllm.LLM(model=str(folder), **usual | options)
        try:
            yield engine
        finally:
            engine.llm_engine.engine_core.shutdown()
            del engine
            gc.collect()  # an engine that is collected later ends the next one's process group
    finally:
        duo_id_vllm.register(None)


def says(engine: Any, prompts: list[list[int]], new: int = 16, **sampling: Any) -> list[Any]:
    """vLLM's answers to a batch of prompts, greedily unless `sampling` says otherwise."""
    usual = {"temperature": 0, "max_tokens": new, "detokenize": False, "ignore_eos": True}
    parameters = vllm.SamplingParams(**usual | sampling)
    return list(engine.generate([{"prompt_token_ids": prompt} for prompt in prompts], parameters, use_tqdm=False))


def tokens(outputs: list[Any]) -> list[list[int]]:
    """The tokens of the first answer to each prompt."""
    return [list(output.outputs[0].token_ids) for output in outputs]


def scheduler(engine: Any) -> Any:
    """vLLM's scheduler."""
    return engine.llm_engine.engine_core.engine_core.scheduler
