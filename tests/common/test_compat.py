"""The names that drift between releases of transformers, whichever is installed."""

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, LlavaConfig, LlavaForConditionalGeneration

from duo_id.common.compat import (
    GENERATE_CACHE,
    attention_configs,
    cache_argument,
    cache_from_arguments,
    cache_of,
    implementations,
    implementations_kept,
    set_implementations,
)
from tests.support.tiny import tiny_model

IDS = torch.arange(3, 13)[None]


def test_a_forward_takes_its_cache_under_the_name_that_is_found() -> None:
    model = tiny_model("llama")
    cache = DynamicCache(config=model.config)
    output = model(IDS, **{cache_argument(model): cache}, use_cache=True)
    assert cache_of(output) is cache
    assert cache.get_seq_length() == IDS.shape[1]
    generated = model.generate(IDS, max_new_tokens=2, return_dict_in_generate=True, **{GENERATE_CACHE: cache})
    assert cache_of(generated) is cache


def test_the_name_is_that_of_the_forward_whichever_transformers_prefers() -> None:
    def old(input_ids: Tensor, past_key_values: Any = None) -> None: ...
    def new(input_ids: Tensor, cache: Any = None) -> None: ...
    def neither(input_ids: Tensor, **options: Any) -> None: ...

    assert [cache_argument(call) for call in (old, new, neither)] == ["past_key_values", "cache", GENERATE_CACHE]


def test_a_cache_is_found_under_either_name() -> None:
    cache = object()
    for arguments in ({"cache": cache}, {"past_key_values": cache}, {"cache": None, "past_key_values": cache}):
        assert cache_from_arguments(arguments) is cache
    assert cache_from_arguments({"cache": None, "use_cache": True}) is None


def test_an_output_without_a_cache_has_none() -> None:
    assert cache_of(tiny_model("llama")(IDS, use_cache=False)) is None


def test_a_part_without_a_module_of_its_own_is_found() -> None:
    model = tiny_model("llama")
    model.config = LlavaConfig(text_config=model.model.config)
    config_ids = {id(part) for part in attention_configs(model)}
    assert {id(part) for part in (model.config, model.config.vision_config, model.model.config)} <= config_ids


def test_every_part_keeps_the_attention_that_it_had() -> None:
    text = tiny_model("llama").config
    vision = {"model_type": "clip_vision_model", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
              "num_attention_heads": 2, "image_size": 8, "patch_size": 4}  # fmt: skip
    model = LlavaForConditionalGeneration(LlavaConfig(text_config=text, vision_config=vision, image_token_index=90))
    model.set_attn_implementation({"text_config": "eager", "vision_config": "sdpa"})
    config = model.config
    assert {id(part) for part in (config, config.text_config, config.vision_config)} <= {
        id(part) for part in attention_configs(model)
    }
    original = implementations(model)
    with implementations_kept(model):
        model.set_attn_implementation("sdpa")
        assert config.text_config._attn_implementation == "sdpa"
    assert implementations(model) == original
    set_implementations([(config, "eager")])
    assert [part._attn_implementation for part in (config, config.vision_config)] == ["eager", "sdpa"]
