"""Every causal language model of transformers at a tiny size, under gates and masks.

`python -m tests.support.families` writes the table of docs/models.md, which `tests/models/test_families.py` checks.
"""

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from duo_id import HeadMask, duo_attention
from duo_id.attention.blends import BLENDS
from duo_id.attention.functions import Backends, gated_heads, masked_layers
from duo_id.attention.interface import attached, bound
from duo_id.attention.layers import AttentionLayer
from duo_id.attention.window import Window
from duo_id.common.errors import UserError
from duo_id.data.samples import with_scored
from duo_id.models.gated_model import GatedModel
from duo_id.models.language_model import LanguageModel
from duo_id.models.tokenizers import byte_tokenizer
from duo_id.step.distillation import Distillation
from duo_id.step.objectives import OBJECTIVES
from tests.deploy.reference import brute_force
from tests.support.tiny import draw_weights, exact_attention

TABLE = Path(__file__).parents[2] / "docs" / "models.md"
START, END = "<!-- families: python -m tests.support.families -->", "<!-- end of families -->"
FAMILIES = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
WINDOW, TOKENS, NEW = Window(1, 3), 128, 3
LARGEST = 9_000_000  # parameters of a tiny model

# Under every name that families use; a family ignores those that it does not use.
LAYERS = {"num_hidden_layers": 4}
SIZES: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 192, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 95,
    "num_experts": 2, "num_local_experts": 2, "n_routed_experts": 2, "moe_num_experts": 2, "num_experts_per_tok": 1,
    "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16, "n_group": 1, "topk_group": 1,
    "sliding_window": 5,
    "is_decoder": True, "decoder_layers": 4, "encoder_layers": 1, "decoder_attention_heads": 4,
    "encoder_attention_heads": 4, "decoder_ffn_dim": 32, "encoder_ffn_dim": 32,
}  # fmt: skip
HYBRID = ["sliding_attention", "full_attention"] * 2
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_d_state": 8}
PER_LAYER = {
    "layer_types": HYBRID, "head_dim": 8, "num_kv_shared_layers": 2, "vocab_size_per_layer_input": 96,
    "hidden_size_per_layer_input": 8,
}  # fmt: skip
WINDOWED = ("mistral", "ministral3", "mixtral", "phi3", "phimoe", "starcoder2", "olmoe", "minimax")
NARROW = ("helium", "hunyuan_v1_dense", "hunyuan_v1_moe", "ministral", "dots1")
LATENT = (
    "axk1 axk2 bailing_hybrid deepseek_v2 deepseek_v3 glm4_moe_lite kimi_linear longcat_flash minicpm3 youtu"
).split()
FAMILY_SIZES: dict[str, dict[str, Any]] = {
    **{family: {"num_key_value_heads": 4} for family in LATENT},
    **{family: {"sliding_window": None} for family in WINDOWED},  # else every layer of some has a window
    **{family: {"head_dim": 8} for family in NARROW},
    "codegen": {"rotary_dim": 4},
    "gptj": {"rotary_dim": 4},
    "bamba": MAMBA | {"attn_layer_indices": [1, 3]},
    "gemma3n_text": PER_LAYER | {"laurel_rank": 4, "altup_num_inputs": 2, "activation_sparsity_pattern": [0.0] * 4},
    "gemma4_text": PER_LAYER | {"global_head_dim": 8},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "granitemoehybrid": MAMBA | {"layer_types": ["mamba", "attention"] * 2},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False},
    "minimax_m3_vl_text": {"layer_types": ["minimax_m3_sparse", "full_attention"] * 2, "index_block_size": 8},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2, "num_dense_layers": 1},
}


@dataclass(frozen=True)
class Outcome:
    """The result for a family.

    Attributes:
        works: whether its heads can be gated, masked and deployed.
        gated: its gated layers out of all, such as "2 of 4".
        why: the reason if it does not work.
        built: whether there is a tiny model to try.
    """

    works: bool
    gated: str = ""
    why: str = ""
    built: bool = True


class Unbuilt(Exception):
    """A family has no tiny model."""


def tiny_config(family: str) -> PreTrainedConfig:
    """At least four layers, with every type of layer that the family has, and full attention if it allows that."""
    sizes = LAYERS | SIZES | FAMILY_SIZES.get(family, {})
    config = AutoConfig.for_model(family, **sizes)
    tiny_types = getattr(config, "layer_types", None)
    if not tiny_types or "layer_types" in sizes:
        return config
    default_types = getattr(AutoConfig.for_model(family), "layer_types", None) or tiny_types
    all_types = list(dict.fromkeys([*default_types, *tiny_types]))
    if "full_attention" not in all_types and "sliding_attention" in all_types:
        all_types.append("full_attention")
    if set(all_types) == set(tiny_types):
        return config
    layer_types = (all_types * 4)[: max(4, len(all_types))]
    return AutoConfig.for_model(family, **sizes | {"num_hidden_layers": len(layer_types), "layer_types": layer_types})


def tiny_model(family: str) -> PreTrainedModel:
    """A frozen random model in float32.

    Raises:
        Unbuilt: the family has none.
    """
    try:
        config = tiny_config(family)
        with torch.device("meta"):
            parameters = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
        if parameters > LARGEST:
            raise Unbuilt(f"{parameters // 10**6}M parameters where this test says how large a model is")
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(
                config, dtype=torch.float32, attn_implementation=exact_attention(config)
            )
            draw_weights(model)
    except Unbuilt:
        raise
    except Exception as error:
        raise Unbuilt(f"{type(error).__name__}: {error}".partition("\n")[0]) from error
    return model.eval().requires_grad_(False)


def runnable_model(family: str) -> PreTrainedModel:
    """The tiny model of a family; skips the test if none runs."""
    try:
        model = tiny_model(family)
        with torch.no_grad():
            model(random_tokens(tokens=16), use_cache=False)
    except Exception as error:
        pytest.skip(str(error).partition("\n")[0])
    return model


def random_tokens(samples: int = 1, tokens: int = TOKENS) -> Tensor:
    """Random tokens that every tiny model has, (samples, tokens)."""
    return torch.randint(3, 90, (samples, tokens), generator=torch.Generator().manual_seed(1))


def try_family(family: str) -> Outcome:
    """Gate, mask and deploy a family's tiny model.

    Raises:
        AssertionError: a result is wrong.
    """
    try:
        model = tiny_model(family)
    except Unbuilt as error:
        return Outcome(False, built=False, why=str(error))
    ids = random_tokens()
    try:
        with torch.no_grad():
            expected = model(ids, use_cache=False).logits
    except Exception as error:
        return Outcome(False, built=False, why=f"untouched it does not run: {error}".partition("\n")[0])
    try:
        with attached(model):
            pass
    except UserError as error:
        return Outcome(False, why=str(error))
    with attached(model) as layers:
        mask = mask_of(model, layers)
        check_gates(model, layers, ids, expected)
        check_step(model, layers, ids)
        with torch.no_grad(), bound(layers, masked_layers(layers, mask, Backends())):
            masked = model(ids, use_cache=False).logits
    total = model.config.get_text_config().num_hidden_layers
    rows = mask.retrieval.clone()
    for layer in layers:
        for module in layer.sharers:
            rows[module.layer_idx] = rows[layer.index]
    with torch.no_grad(), brute_force(model, HeadMask(rows, mask.sink_size, mask.recent_size)):
        assert_close(masked, model(ids, use_cache=False).logits, "hard mask")
    assert (masked - expected).abs().max() > 1e-4, "the mask changes nothing"
    gated = f"{len(layers)} of {total}"
    try:
        check_deployed(model, mask, ids)
    except (UserError, ValueError) as error:  # ValueError: from models that only accept a cache of their own
        return Outcome(True, gated, f"no dual cache: {error}")
    return Outcome(True, gated)


def mask_of(model: PreTrainedModel, layers: list[AttentionLayer]) -> HeadMask:
    """A mask of alternating heads; the only KV head of a layer streams."""
    retrieval = torch.ones(model.config.get_text_config().num_hidden_layers, layers[0].kv_heads, dtype=torch.bool)
    for layer in layers:
        retrieval[layer.index, ::2] = False
    return HeadMask(retrieval, WINDOW.sink_size, WINDOW.recent_size, [layer.index for layer in layers])


def check_gates(model: PreTrainedModel, layers: list[AttentionLayer], ids: Tensor, expected: Tensor) -> None:
    """With all gates at 1 the outputs are the model's own, and every layer's gates get a gradient."""

    def logits(alpha: Tensor) -> Tensor:
        pairs = zip(layers, alpha, strict=True)
        functions = {layer.index: gated_heads(row, WINDOW, BLENDS["student"], Backends()) for layer, row in pairs}
        with bound(layers, functions):
            return model(ids, use_cache=False).logits

    shape = (len(layers), layers[0].kv_heads)
    with torch.no_grad():
        assert_close(logits(torch.ones(shape)), expected, "gates at 1")
    alpha = torch.full(shape, 0.5, requires_grad=True)
    (gradient,) = torch.autograd.grad(logits(alpha).square().mean(), alpha)
    assert gradient.isfinite().all(), "a gradient is not finite"
    assert (gradient.abs().amax(-1) > 0).all(), "a layer's gates get no gradient"


def check_step(model: PreTrainedModel, layers: list[AttentionLayer], ids: Tensor) -> None:
    """With all gates at 1 the loss of a training step is zero, for logits and for hidden states."""
    wrapped = LanguageModel(model, byte_tokenizer(), "tiny", "tiny", None, "random")
    batch = with_scored({"input_ids": ids, "labels": ids, "attention_mask": None})
    for objective in ("kl", "hidden_l2"):
        distillation = Distillation(GatedModel(wrapped, layers, WINDOW, Backends()), OBJECTIVES[objective])
        for value, low, high in ((1.0, -1e-5, 1e-4), (0.5, 1e-9, torch.inf)):
            loss = distillation.loss(torch.full((len(layers), layers[0].kv_heads), value), batch).item()
            assert low <= loss <= high, f"{objective} of gates at {value}: {loss}"


def check_deployed(model: PreTrainedModel, mask: HeadMask, ids: Tensor) -> None:
    """Decoding with the dual cache gives the same logits as decoding without a cache."""

    def decoded(cached: bool) -> Tensor:
        output = model.generate(
            ids, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, use_cache=cached, output_logits=True,
            return_dict_in_generate=True, forced_eos_token_id=None,
            suppress_tokens=[0],  # padding, which some families give no position
        )  # fmt: skip
        return torch.stack(output.logits, 1)

    with torch.no_grad(), duo_attention(model, mask):
        assert_close(decoded(True), decoded(False), "dual cache")


def assert_close(logits: Tensor, expected: Tensor, label: str) -> None:
    """Assert that the largest error is at most 1e-4 of the largest logit."""
    error = ((logits - expected).abs().max() / expected.abs().max()).item()
    assert error <= 1e-4, f"{label}: error {error:.1e}"


def row(family: str, outcome: Outcome) -> str:
    """A row of the table."""
    verdict = "works" if outcome.works else "refused" if outcome.built else "not tried"
    return f"| {family} | {verdict} | {outcome.gated} | {outcome.why.replace('|', '/')} |"


def main() -> None:
    """Try all families and write the table."""
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    lines = ["| family | verdict | gated layers | why |", "| --- | --- | --- | --- |"]
    for family in FAMILIES:
        try:
            outcome = try_family(family)
        except Exception as error:
            outcome = Outcome(False, why=f"WRONG: {str(error).partition(chr(10))[0]}")
        lines.append(row(family, outcome))
        print(lines[-1], flush=True)
    text = TABLE.read_text()
    before, _, rest = text.partition(START)
    TABLE.write_text(before + "\n".join([START, *lines, END]) + rest.partition(END)[2])


if __name__ == "__main__":
    main()
