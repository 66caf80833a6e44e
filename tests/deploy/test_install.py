"""A model goes under a head mask and comes back as it was; what cannot work is refused and named."""

import copy
import pickle
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    DynamicCache,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
    StaticCache,
    pipeline,
)

from duo_id import DualCache, HeadMask, HeadPattern, dual_cache, duo_attention, install, prefill, remove
from duo_id.common.compat import GENERATE_CACHE, attention_configs, cache_of
from duo_id.common.errors import UserError
from duo_id.deploy.chunks import continuation
from duo_id.deploy.install import INSTALLED
from duo_id.models.loading import byte_tokenizer
from duo_id.patterns.random_masks import random_mask
from duo_id.patterns.spans import ALL, HeadSpans
from tests.deploy.cases import (
    HYBRID,
    TOKENS,
    build,
    case,
    check_equal,
    mask_for,
    padded_ids,
    random_ids,
    reference,
    run,
)
from tests.support.pairs import pairwise
from tests.support.tiny import tiny_model

SHARED_KV: dict[str, dict[str, Any]] = {
    "gemma3n_text": {"laurel_rank": 4, "altup_num_inputs": 2, "activation_sparsity_pattern": [0.0] * 4},
    "gemma4_text": {"global_head_dim": 16},
}
MIXED = torch.tensor([[True, False], [False, False], [True, True], [False, True]])
masks = pytest.mark.parametrize("kind", ["mixed", "spans"])


def traces(model: PreTrainedModel) -> list[Any]:
    """All that a deployment might leave on a model: attributes and hooks of every module, and the attention's name."""
    modules = [
        (
            name,
            sorted(vars(module)),
            {key: len(value) for key, value in vars(module).items() if key.endswith(("_hooks", "_hooks_with_kwargs"))},
        )
        for name, module in model.named_modules()
    ]
    return [modules, model.config._attn_implementation, vars(model).get("_compiled_call"), model.forward.__func__]


@pytest.fixture
def model() -> PreTrainedModel:
    return build("llama")


@pytest.fixture
def ids() -> Tensor:
    return random_ids(2, 40)


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "gemma3_text"])
def test_the_model_is_as_before(family: str) -> None:
    model, ids = build(family), random_ids(2, 40)
    mask, before = mask_for(model), traces(model)
    logits, text = model(ids).logits, model.generate(ids, max_new_tokens=8, do_sample=False)
    with duo_attention(model, mask):
        assert (model(ids).logits - logits).abs().max() > 1e-2
        assert not torch.equal(model.generate(ids, max_new_tokens=8, do_sample=False), text)
    assert traces(model) == before
    output = model(ids)
    assert torch.equal(output.logits, logits)
    assert type(output.past_key_values) is DynamicCache
    assert torch.equal(model.generate(ids, max_new_tokens=8, do_sample=False), text)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_also_after_an_exception(model: PreTrainedModel, ids: Tensor, error: type[BaseException]) -> None:
    mask, before, expected = mask_for(model), traces(model), model(ids).logits

    def fails() -> None:
        with duo_attention(model, mask):
            model(ids)
            raise error

    with pytest.raises(error):
        fails()
    assert traces(model) == before
    assert torch.equal(model(ids).logits, expected)


def test_also_after_an_exception_in_the_middle_of_a_forward(model: PreTrainedModel, ids: Tensor) -> None:
    before, expected = traces(model), model(ids).logits

    def stop(*args: Any) -> None:
        raise RuntimeError("in the third layer")

    hook = model.model.layers[2].register_forward_pre_hook(stop)
    with pytest.raises(RuntimeError, match="third layer"), duo_attention(model, mask_for(model)):
        model(ids)
    hook.remove()
    assert traces(model) == before
    assert torch.equal(model(ids).logits, expected)


def test_a_compiled_forward_is_set_aside_and_put_back(model: PreTrainedModel) -> None:
    kept = model.__dict__["_compiled_call"] = object()
    with duo_attention(model, mask_for(model)):
        assert "_compiled_call" not in vars(model)
        model.__dict__["_compiled_call"] = object()  # as transformers does when it compiles
    assert vars(model)["_compiled_call"] is kept
    del model.__dict__["_compiled_call"]
    with duo_attention(model, mask_for(model)):
        model.__dict__["_compiled_call"] = object()
    assert "_compiled_call" not in vars(model)


def test_install_and_remove_are_the_same_as_calls() -> None:
    given = case("llama")
    before = traces(given.model)
    install(given.model, given.mask)
    try:
        check_equal(run(given.model, given.ids, dual_cache(given.model), 7), given.logits)
        with pytest.raises(UserError, match="already under duo_attention"):
            install(given.model, given.mask)
        with pytest.raises(UserError, match="already under duo_attention"), duo_attention(given.model, given.mask):
            pass
        check_equal(given.model(given.ids).logits, given.logits)
    finally:
        remove(given.model)
    assert traces(given.model) == before
    for call in (remove, dual_cache):
        with pytest.raises(UserError, match="not under duo_attention"):
            call(given.model)


def test_a_pattern_with_a_budget_is_its_mask() -> None:
    given = case("llama")
    layers, kv_heads = given.mask.retrieval.shape
    pattern = HeadPattern(torch.rand(layers, kv_heads), given.mask.sink_size, given.mask.recent_size)
    for budget in ({"sparsity": 0.5}, {"threshold": 0.3}):
        with duo_attention(given.model, pattern.binarize(**budget)):
            expected = given.model(given.ids).logits
        with duo_attention(given.model, pattern, **budget):
            assert torch.equal(given.model(given.ids).logits, expected)


@pytest.mark.parametrize(
    ("heads", "budget", "message"),
    [
        (HeadPattern(torch.rand(3, 2), 3, 8), {}, "^pass either sparsity or threshold, not neither$"),
        (HeadPattern(torch.rand(3, 2), 3, 8), {"sparsity": 0.5, "threshold": 0.5}, "not both$"),
        (HeadPattern(torch.rand(3, 2), 3, 8).binarize(sparsity=0.5), {"sparsity": 0.5}, "^a HeadMask has decided"),
        (torch.ones(3, 2), {}, "^a Tensor is neither a HeadMask, nor a HeadSpans, nor a HeadPattern$"),
        (HeadSpans(torch.full((3, 2), 8), 3), {"sparsity": 0.5}, "^a HeadSpans has decided"),
    ],
    ids=["no budget", "two budgets", "a mask with a budget", "a tensor", "spans with a budget"],
)
def test_heads_that_leave_it_open_who_streams(
    heads: Any, budget: dict[str, float], message: str, model: PreTrainedModel
) -> None:
    with pytest.raises(UserError, match=message), duo_attention(model, heads, **budget):
        pass
    assert not hasattr(model, INSTALLED)


def test_one_mask_after_another(model: PreTrainedModel, ids: Tensor) -> None:
    before = traces(model)
    for mask in (mask_for(model, 1, 4), mask_for(model, 3, 8, "none"), mask_for(model, 0, 2)):
        with reference(model, mask):
            expected = model(ids, use_cache=False).logits
        with duo_attention(model, mask):
            check_equal(model(ids).logits, expected)
    assert traces(model) == before


@pytest.mark.parametrize("first_out", [0, 1])
def test_two_models_under_two_masks(first_out: int) -> None:
    given = [case("llama"), case("gemma3_text", "mixed", 1, 5)]
    with ExitStack() as stays, ExitStack() as goes:
        for place, one in enumerate(given):
            (goes if place == first_out else stays).enter_context(duo_attention(one.model, one.mask))
        caches = [dual_cache(one.model) for one in given]
        for start in range(0, TOKENS, 12):
            for one, cache in zip(given, caches, strict=True):
                part = slice(start, start + 12)
                check_equal(one.model(one.ids[:, part], past_key_values=cache).logits, one.logits[:, part])
        with pytest.raises(UserError, match="another head mask"):
            given[0].model(given[0].ids, past_key_values=caches[1])
        goes.close()
        left = given[1 - first_out]
        check_equal(left.model(left.ids).logits, left.logits)


def test_which_cache_the_model_makes(model: PreTrainedModel, ids: Tensor) -> None:
    with duo_attention(model, mask_for(model)):
        assert type(model(ids).past_key_values) is DualCache
        assert type(model(ids, use_cache=True).past_key_values) is DualCache
        assert type(model.base_model(ids).past_key_values) is DualCache
        assert model(ids, use_cache=False).past_key_values is None
        model.config.use_cache = False
        assert model(ids).past_key_values is None
        made = model.generate(ids, max_new_tokens=3, return_dict_in_generate=True, cache_implementation="static")
        assert made.past_key_values.max_length >= 42
        made = model.generate(
            ids, max_new_tokens=3, return_dict_in_generate=True, cache_implementation="static", max_cache_len=77
        )
        assert made.past_key_values.max_length == 77


@pytest.mark.parametrize("batch_size", [1, 3])
def test_pipeline(batch_size: int) -> None:
    model, tokenizer = build("llama", vocab_size=260), byte_tokenizer()
    tokenizer.padding_side, tokenizer.pad_token = "left", tokenizer.eos_token
    texts = ["the hill", "a far longer line of text", "one more than those two"]
    options = {"max_new_tokens": 12, "do_sample": False, "batch_size": batch_size, "return_full_text": False}
    mask = mask_for(model)
    generator = pipeline("text-generation", model=model, tokenizer=tokenizer)
    plain = generator(texts, **options)
    with reference(model, mask):
        expected = generator(texts, use_cache=False, **options)
    with duo_attention(model, mask):
        assert generator(texts, **options) == expected
        assert pipeline("text-generation", model=model, tokenizer=tokenizer)(texts, **options) == expected
    assert generator(texts, **options) == plain != expected


def test_under_inference_mode() -> None:
    given = case("llama")
    with duo_attention(given.model, given.mask), torch.inference_mode():
        for max_length in (None, TOKENS):
            check_equal(run(given.model, given.ids, dual_cache(given.model, max_length), 7), given.logits)


# What is refused


@pytest.mark.parametrize("other", [DynamicCache, lambda config: StaticCache(config, max_cache_len=100)])
def test_ordinary_caches_are_refused(model: PreTrainedModel, ids: Tensor, other: Callable[..., Any]) -> None:
    with duo_attention(model, mask_for(model)):
        cache = other(config=model.config)
        name = type(cache).__name__
        for call in (model, model.base_model, model.generate):
            with pytest.raises(UserError, match=f"a {name} does not work .*dual_cache"):
                call(ids, past_key_values=cache)
        assert cache.get_seq_length() == 0


def test_a_cache_from_before_the_block_is_refused(model: PreTrainedModel, ids: Tensor) -> None:
    cache = model(ids).past_key_values
    with duo_attention(model, mask_for(model)), pytest.raises(UserError, match="DynamicCache does not work"):
        model(ids[:, :1], past_key_values=cache)


@pytest.mark.parametrize("changed", ["heads", "sink", "recent", "one span"])
def test_a_cache_for_another_mask_is_refused(model: PreTrainedModel, ids: Tensor, changed: str) -> None:
    masks = {
        "heads": HeadMask(~MIXED, 3, 8),
        "sink": HeadMask(MIXED, 4, 8),
        "recent": HeadMask(MIXED, 3, 7),
        "one span": HeadSpans(torch.where(MIXED, ALL, torch.tensor([8, 9])), 3),
    }
    with duo_attention(model, masks[changed]):
        cache = model(ids).past_key_values
    with duo_attention(model, HeadMask(MIXED, 3, 8)):
        held = [layer.recent.key.clone() for layer in cache.layers]
        for call in (model, model.generate):
            with pytest.raises(UserError, match="another head mask"):
                call(ids, past_key_values=cache)
        assert cache.get_seq_length() == 40
        assert all(torch.equal(layer.recent.key, key) for layer, key in zip(cache.layers, held, strict=True))


@pytest.mark.parametrize("kind", [HeadMask, HeadSpans], ids=["mask", "spans"])
def test_a_cache_goes_on_in_another_block_of_the_same_mask(kind: type) -> None:
    given = case("llama")
    same = HeadMask(given.mask.retrieval, given.mask.sink_size, given.mask.recent_size)
    if kind is HeadSpans:
        same = HeadSpans(same.spans, same.sink_size)
    with duo_attention(given.model, given.mask):
        cache = dual_cache(given.model)
        first = given.model(given.ids[:, :40], past_key_values=cache).logits
    with duo_attention(given.model, same):
        second = given.model(given.ids[:, 40:], past_key_values=cache).logits
    check_equal(torch.cat([first, second], 1), given.logits)


def test_a_cache_of_another_model_is_refused(model: PreTrainedModel, ids: Tensor) -> None:
    twin, mask = build("llama"), mask_for(model)
    with duo_attention(model, mask), duo_attention(twin, mask):
        cache = twin(ids).past_key_values
        with pytest.raises(UserError, match="another model"):
            model(ids, past_key_values=cache)


@pytest.mark.parametrize(
    ("mask", "reason"),
    [
        (HeadMask(torch.ones(3, 2, dtype=torch.bool), 3, 8), "for 3 layers x 2 KV heads, .* has 4 layers x 2 KV heads"),
        (HeadMask(torch.ones(4, 4, dtype=torch.bool), 3, 8), "for 4 layers x 4 KV heads, .* has 4 layers x 2 KV heads"),
    ],
)
def test_a_mask_for_another_shape_is_refused(model: PreTrainedModel, mask: HeadMask, reason: str) -> None:
    before = traces(model)
    with pytest.raises(UserError, match=reason):
        install(model, mask)
    assert traces(model) == before


def test_a_window_in_every_layer_is_told_in_the_words_of_python() -> None:
    model, mask = tiny_model("mistral", sliding_window=64), HeadMask(torch.ones(3, 2, dtype=torch.bool), 4, 8)
    with pytest.raises(UserError, match=r"; sliding_window=None in the model's config treats them"):
        install(model, mask)


def test_a_mask_about_layers_without_gates_is_refused() -> None:
    model = build("gemma3_text")
    before = traces(model)
    with pytest.raises(UserError, match=r"layers \[0, 2\], which have no gates"):
        install(model, HeadMask(MIXED, 3, 8))
    assert traces(model) == before


@pytest.mark.parametrize(
    ("family", "changes", "reason"),
    [
        ("falcon", {}, "no attention that can be gated"),
        ("bloom", {"n_layer": 3}, "no attention that can be gated"),
        ("mamba", {}, "no attention that can be gated"),
        ("deepseek_v3", {"num_key_value_heads": 4}, "latent attention"),
        ("mistral", {"sliding_window": 16}, "sliding window of 16"),
        (
            "llama4_text",
            {
                "attention_chunk_size": 8, "head_dim": 16, "intermediate_size_mlp": 48, "num_local_experts": 2,
                "num_hidden_layers": 4, "layer_types": ["chunked_attention", "full_attention"] * 2,
                "no_rope_layers": [1, 0] * 2,
            },
            r"layers \[0, 2\], which have no gates",
        ),
    ],
)  # fmt: skip
def test_models_that_cannot_be_deployed_are_named(family: str, changes: dict[str, Any], reason: str) -> None:
    model = tiny_model(family, **changes)
    before = traces(model)
    config = model.config.get_text_config()
    mask = HeadMask(torch.zeros(config.num_hidden_layers, 2, dtype=torch.bool), 3, 8)
    with pytest.raises(UserError, match=reason):
        install(model, mask)
    assert traces(model) == before


@pairwise(row=[[ALL, 8], [5, 21]], family=SHARED_KV, max_length=[None, 100])
def test_layers_that_share_keys_share_a_row_of_the_mask(family: str, max_length: int | None, row: list[int]) -> None:
    """Layers 2 and 3 read the keys of 0 and 1: they are masked with these, and have no place in the cache."""
    model = tiny_model(
        family, num_hidden_layers=4, num_kv_shared_layers=2, layer_types=HYBRID, sliding_window=9, head_dim=16,
        vocab_size_per_layer_input=96, hidden_size_per_layer_input=8, **SHARED_KV[family],
    )  # fmt: skip
    ids = random_ids(2, TOKENS)
    spans = torch.tensor([[ALL, ALL], row] * 2)
    mask = HeadSpans(spans, 3, [1])
    with reference(model, HeadSpans(spans, 3)):
        expected = model(ids, use_cache=False).logits
    with duo_attention(model, mask), torch.no_grad():
        check_equal(model(ids, use_cache=False).logits, expected)
        for chunk in (7, 40):
            cache = dual_cache(model, max_length)
            check_equal(run(model, ids, cache, chunk), expected)
            assert len(cache.dual_layers) == 2
        found = model.generate(ids[:1, :30], max_new_tokens=9, do_sample=False)
        assert torch.equal(model.generate(ids[:1, :30], max_new_tokens=9, do_sample=False, use_cache=False), found)
        lookup = model.generate(ids[:1, :30], max_new_tokens=9, do_sample=False, prompt_lookup_num_tokens=3)
        assert torch.equal(lookup, found)
        if max_length is None:
            cache = dual_cache(model)
            cache.activate_past_recording(6)
            run(model, ids, cache, 7)  # the last ten tokens come one by one
            cache.crop(-6)
            found = model(ids[:, -6:], past_key_values=cache).logits
            check_equal(found, expected[:, -6:])
        padded, real, _ = padded_ids()
        options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
        batch = model.generate(padded, attention_mask=real, **options)
        alone = model.generate(padded[1:2, -43:], **options)
        assert torch.equal(batch[1, -5:], alone[0, -5:])
    other = HeadSpans(spans, 3, [1, 3])
    with pytest.raises(UserError, match=r"layers \[3\], which have no gates"), duo_attention(model, other):
        pass


@pytest.mark.parametrize("kind", ["quantized", "offloaded", "offloaded_static"])
def test_other_caches_of_generate_are_refused(model: PreTrainedModel, ids: Tensor, kind: str) -> None:
    with (
        duo_attention(model, mask_for(model)),
        pytest.raises(UserError, match=f"cache_implementation={kind}: .*static"),
    ):
        model.generate(ids, max_new_tokens=2, cache_implementation=kind)


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
@pytest.mark.parametrize("way", ["made", "growing", "static", "none"])
def test_attention_masks_of_four_dimensions_are_refused(
    model: PreTrainedModel, ids: Tensor, way: str, dtype: torch.dtype
) -> None:
    """They could only be obeyed by forgetting the head mask."""
    seen = torch.ones(40, 40, dtype=torch.bool).tril()[None, None].expand(2, 1, -1, -1)
    if dtype is torch.float32:
        seen = torch.zeros(seen.shape).masked_fill(~seen, -torch.inf)
    with duo_attention(model, mask_for(model)):
        options = {
            "made": lambda: {"use_cache": True},
            "growing": lambda: {"past_key_values": dual_cache(model)},
            "static": lambda: {"past_key_values": dual_cache(model, 40)},
            "none": lambda: {"use_cache": False},
        }[way]()
        with pytest.raises(UserError, match="attention_mask"):
            model(ids, attention_mask=seen, **options)


def test_prefill_refuses_what_means_nothing(model: PreTrainedModel, ids: Tensor) -> None:
    with duo_attention(model, mask_for(model)):
        with pytest.raises(UserError, match="chunk_size=0"):
            prefill(model, ids, dual_cache(model), 0)
        with pytest.raises(UserError, match="at least one token"):
            prefill(model, ids[:, :0], dual_cache(model))


def test_prefill_computes_the_last_logits_alone(model: PreTrainedModel, ids: Tensor) -> None:
    seen: list[int] = []
    with duo_attention(model, mask_for(model)):
        continuation(model, ids)  # has been tried
        model.lm_head.register_forward_hook(lambda module, inputs, output: seen.append(output.shape[1]))
        prefill(model, ids, dual_cache(model), 16)
    assert seen == [1, 1, 1]


def test_a_forward_that_was_interrupted_spoils_its_cache_until_reset(model: PreTrainedModel, ids: Tensor) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with duo_attention(model, mask_for(model)):
        expected = model(ids).logits
        cache = dual_cache(model)
        hook = model.model.layers[1].register_forward_pre_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            model(ids, past_key_values=cache)
        hook.remove()
        with pytest.raises(UserError, match="interrupted"):
            model(ids, past_key_values=cache)
        cache.reset()
        assert torch.equal(model(ids, past_key_values=cache).logits, expected)


def test_a_mask_may_go_on_beyond_the_text(model: PreTrainedModel, ids: Tensor) -> None:
    longer = torch.zeros(len(ids), ids.shape[1] + 6, dtype=torch.long)
    longer[:, : ids.shape[1]] = 1
    with duo_attention(model, mask_for(model)):
        for max_length in (None, 100):
            found = model(ids, attention_mask=longer, past_key_values=dual_cache(model, max_length)).logits
            assert torch.equal(found, model(ids).logits)


def test_packed_sequences_are_refused(model: PreTrainedModel, ids: Tensor) -> None:
    packed = torch.cat([torch.arange(10)] * (ids.shape[1] // 10))[None]
    with duo_attention(model, mask_for(model)), pytest.raises(UserError, match="packed sequences"):
        model(ids[:1, : packed.shape[1]], position_ids=packed, use_cache=False)


def test_the_inner_model_takes_a_cache_and_a_mask_by_place(model: PreTrainedModel, ids: Tensor) -> None:
    real = torch.ones_like(ids)
    real[0, :7] = 0
    positions = (real.cumsum(-1) - 1).clamp(min=0)
    with duo_attention(model, mask_for(model)):
        named = model.model(ids, attention_mask=real, position_ids=positions).last_hidden_state
        assert torch.equal(model.model(ids, real, positions).last_hidden_state, named)
        with pytest.raises(UserError, match="DynamicCache"):
            model.model(ids, None, None, DynamicCache(config=model.config))


@pytest.mark.parametrize("max_length", [None, 60])
def test_a_model_that_goes_round_its_base_model(max_length: int | None) -> None:
    """Its language model calls the decoder itself."""
    model = tiny_model("opt", ffn_dim=48, word_embed_proj_dim=32)
    ids, real = torch.randint(3, 96, (2, 30), generator=torch.Generator().manual_seed(0)), torch.ones(2, 30)
    real[0, :11] = 0
    mask = random_mask(3, 4, 0.5, 0, sink_size=2, recent_size=5)
    options = {"attention_mask": real.long(), "max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    with duo_attention(model, mask):
        expected = model.generate(ids, use_cache=False, **options)
        assert torch.equal(model.generate(ids, past_key_values=dual_cache(model, max_length), **options), expected)
        with pytest.raises(UserError, match="DynamicCache"):
            model(ids, past_key_values=DynamicCache(config=model.config))


def test_a_copy_of_a_cache_goes_on_by_itself(model: PreTrainedModel, ids: Tensor) -> None:
    with duo_attention(model, mask_for(model)), torch.no_grad():
        expected = model(ids).logits[:, -1]
        cache = dual_cache(model)
        prefill(model, ids[:, :20], cache)
        for _ in range(2):
            torch.testing.assert_close(prefill(model, ids[:, 20:], copy.deepcopy(cache)), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("what", "named"),
    [
        (lambda model, ids: prefill(model, ids, None), "NoneType"),
        (lambda model, ids: prefill(model, ids[0], dual_cache(model)), "input_ids"),
        (lambda model, ids: prefill(model, ids, dual_cache(model), attention_mask=ids[:, :5]), "attention_mask"),
        (lambda model, ids: model(ids, attention_mask=torch.ones(1, ids.shape[1])), "samples"),
        (lambda model, ids: dual_cache(model, 12.5), "max_length"),
    ],
)
def test_arguments_that_cannot_be_are_named(model: PreTrainedModel, ids: Tensor, what: Any, named: str) -> None:
    with duo_attention(model, mask_for(model)), pytest.raises(UserError, match=named):
        what(model, ids)


def test_prefill_of_models_that_cannot_leave_logits_out(
    model: PreTrainedModel, ids: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = model.forward

    def forward(input_ids: Tensor, past_key_values: Any, use_cache: bool | None = None) -> Any:
        return plain(input_ids, past_key_values=past_key_values, use_cache=use_cache)

    with duo_attention(model, mask_for(model)):
        expected = prefill(model, ids, dual_cache(model), 16)
        monkeypatch.setattr(model, "forward", forward)
        check_equal(prefill(model, ids, dual_cache(model), 16), expected)


# Ways in that models have


@pytest.mark.parametrize(
    ("family", "use_cache"), [("llama", True), ("llama", False), ("gemma3_text", True), ("gpt_oss", True)]
)
def test_autocast_is_as_autocast_without_a_mask(family: str, use_cache: bool) -> None:
    """A mask that hides nothing writes what the model writes; the next forward without it is in float32 again."""
    model, ids = build(family), random_ids(2, 40)
    options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "output_logits": True, "use_cache": use_cache}
    full = mask_for(model, kind="all")
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        expected = model.generate(ids, return_dict_in_generate=True, **options)
        with duo_attention(model, full):
            found = model.generate(ids, return_dict_in_generate=True, **options)
    for one, other in zip(found.logits, expected.logits, strict=True):
        assert (one - other).abs().max() < 0.05 * other.abs().max()
    with duo_attention(model, full), torch.no_grad():
        check_equal(model(ids).logits, model(ids, use_cache=False).logits)
    mask = mask_for(model)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        with reference(model, mask):
            expected = model(ids, use_cache=False).logits.float()
        with duo_attention(model, mask):
            found = model(ids, use_cache=use_cache).logits.float()
    assert (found - expected).norm() < 0.05 * expected.norm()


def test_a_cache_does_not_go_on_in_another_type(model: PreTrainedModel, ids: Tensor) -> None:
    with duo_attention(model, mask_for(model)), torch.no_grad():
        cache = dual_cache(model)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            model(ids, past_key_values=cache)
        with pytest.raises(UserError, match=r"bfloat16 keys, but new keys are torch.float32"):
            model(ids[:, :1], past_key_values=cache)


def vision_model() -> PreTrainedModel:
    text = build("llama").config
    vision = {"model_type": "clip_vision_model", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
              "num_attention_heads": 4, "image_size": 28, "patch_size": 14, "projection_dim": 32}  # fmt: skip
    config = LlavaConfig(text_config=text, vision_config=vision, image_token_index=90, vision_feature_layer=-1)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlavaForConditionalGeneration(config).eval().requires_grad_(False)


@pytest.mark.parametrize("implementations", ["sdpa", "eager", {"text_config": "eager", "vision_config": "sdpa"}])
def test_a_vision_language_model_sees_its_images(implementations: Any) -> None:
    model, ids = vision_model(), random_ids(2, 40).clamp(max=80)
    ids[:, 3:7] = 90
    model.set_attn_implementation(implementations)
    before = [part._attn_implementation for part in attention_configs(model)]
    image = {"input_ids": ids, "pixel_values": torch.randn(2, 3, 28, 28, generator=torch.Generator().manual_seed(0))}
    expected = model(**image).logits
    written = model.generate(**image, max_new_tokens=8, do_sample=False)
    full = HeadMask(torch.ones(4, 2, dtype=torch.bool), 3, 8)
    with duo_attention(model, full):
        check_equal(model(**image).logits, expected)
        assert torch.equal(model.generate(**image, max_new_tokens=8, do_sample=False), written)
        assert model.config.vision_config._attn_implementation != "duo_id"
    with duo_attention(model, HeadMask(torch.zeros(4, 2, dtype=torch.bool), 3, 8)):
        assert not torch.equal(model(**image).logits, expected)
    assert [part._attn_implementation for part in attention_configs(model)] == before


@pytest.mark.parametrize("way", ["method", "forward", "wrapper"])
@torch._dynamo.config.patch(recompile_limit=1)  # what does not fit the first graph runs as it is
def test_a_model_that_was_compiled_before(way: str, ids: Tensor) -> None:
    torch._dynamo.reset()
    model = build("llama")
    mask, expected = mask_for(model), model(ids).logits
    given: Any = model
    if way == "method":
        model.compile(backend="eager")
    elif way == "forward":
        model.forward = torch.compile(model.forward, backend="eager")
    else:
        given = torch.compile(model, backend="eager")
    with torch.no_grad():
        check_equal(given(ids).logits, expected)
        plain = build("llama")
        with reference(plain, mask):
            wanted = plain(ids, use_cache=False).logits
        with duo_attention(given, mask):
            check_equal(given(ids).logits, wanted)
            check_equal(given(ids, use_cache=False).logits, wanted)
            cache = dual_cache(given)
            for start, end in ((0, 30), (30, 31), (31, 40)):
                check_equal(given(ids[:, start:end], past_key_values=cache).logits, wanted[:, start:end])
        check_equal(given(ids).logits, expected)


def test_adapters_are_unwrapped(ids: Tensor) -> None:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(build("llama"), peft.LoraConfig(init_lora_weights=False, task_type="CAUSAL_LM")).eval()
    base = model.get_base_model()
    with reference(base, mask_for(base)), torch.no_grad():
        expected = model(ids, use_cache=False).logits
    before = traces(base)
    with duo_attention(model, mask_for(base)), torch.no_grad():
        check_equal(model(ids).logits, expected)
        check_equal(prefill(model, ids, dual_cache(model), 16), expected[:, -1])
        check_equal(model.generate(input_ids=ids, max_new_tokens=1, do_sample=False, output_logits=True,
                                   return_dict_in_generate=True).logits[0], expected[:, -1])  # fmt: skip
    assert traces(base) == before


@pytest.mark.parametrize("given", ["adapter", "base"])
def test_prefix_tuning_is_refused(given: str, ids: Tensor) -> None:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(build("llama"), peft.PrefixTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"))
    mask = mask_for(build("llama"))
    with (
        pytest.raises(UserError, match="prefix tuning"),
        duo_attention(model if given == "adapter" else model.get_base_model(), mask),
    ):
        model.eval().generate(input_ids=ids, max_new_tokens=3, do_sample=False)


@pytest.mark.parametrize("wrapped", [object(), torch.nn.Linear(2, 2)])
def test_what_is_no_model_is_named(wrapped: Any) -> None:
    with pytest.raises(UserError, match=rf"a {type(wrapped).__name__} is not a transformers model"):
        install(wrapped, HeadMask(torch.ones(1, 1, dtype=torch.bool), 1, 1))


# Copies


@masks
@pytest.mark.parametrize("copied", ["saved", "deepcopy"])
def test_a_cache_goes_on_after_it_was_saved(
    tmp_path: Path, model: PreTrainedModel, ids: Tensor, copied: str, kind: str
) -> None:
    mask = mask_for(model, kind=kind)
    with duo_attention(model, mask), torch.no_grad():
        expected = model(ids).logits[:, 30:]
        cache = dual_cache(model)
        model(ids[:, :30], past_key_values=cache)
        torch.save(cache, tmp_path / "cache.pt")
        assert (tmp_path / "cache.pt").stat().st_size < 2 * cache.nbytes + 20_000, "no model is in the file"
    with duo_attention(model, mask), torch.no_grad():
        again = torch.load(tmp_path / "cache.pt", weights_only=False) if copied == "saved" else copy.deepcopy(cache)
        check_equal(model(ids[:, 30:], past_key_values=again).logits, expected)
    other = build("llama", num_key_value_heads=4)
    with duo_attention(other, mask_for(other, kind=kind)), pytest.raises(UserError, match="another head mask"):
        other(ids, past_key_values=torch.load(tmp_path / "cache.pt", weights_only=False))
    wider = build("llama", head_dim=24)
    with duo_attention(wider, mask), pytest.raises(UserError, match="another model"):
        wider(ids, past_key_values=torch.load(tmp_path / "cache.pt", weights_only=False))


def test_a_copy_of_a_masked_model_is_masked_by_itself(model: PreTrainedModel, ids: Tensor) -> None:
    before, plain = traces(model), model(ids).logits
    with duo_attention(model, mask_for(model)):
        expected = model(ids).logits
        twin = copy.deepcopy(model)
        assert torch.equal(model(ids).logits, expected)
        assert torch.equal(twin(ids).logits, expected)
        remove(twin)
        assert torch.equal(twin(ids).logits, plain)
        assert torch.equal(model(ids).logits, expected)
        with pytest.raises(UserError, match="cannot be pickled"):
            pickle.dumps(model)
    assert traces(model) == traces(twin) == before


# What would take the mask off


@pytest.mark.parametrize("method", ["set_attn_implementation", "generate_batch", "init_continuous_batching"])
def test_methods_that_would_take_the_mask_off_are_refused(model: PreTrainedModel, method: str) -> None:
    with duo_attention(model, mask_for(model)), pytest.raises(UserError, match=f"{method} is not possible"):
        getattr(model, method)("sdpa")
    assert not [name for name in vars(model) if name in (method, "__deepcopy__")]
    model.set_attn_implementation("eager")


@pytest.mark.parametrize("through", ["config", "part"])
def test_another_attention_set_in_another_way_is_found(model: PreTrainedModel, ids: Tensor, through: str) -> None:
    with duo_attention(model, mask_for(model)):
        expected = model(ids).logits
        if through == "config":
            model.config._attn_implementation = "sdpa"
        else:
            model.model.set_attn_implementation("sdpa")
        with pytest.raises(UserError, match="set to sdpa under a head mask"):
            model(ids)
        model.config._attn_implementation = "duo_id"
        assert torch.equal(model(ids).logits, expected)


def test_a_cache_of_continuous_batching_is_refused(model: PreTrainedModel, ids: Tensor) -> None:
    class PagedAttentionCache:
        pass

    for name in ("cache", "past_key_values"):
        with (
            duo_attention(model, mask_for(model)),
            pytest.raises(UserError, match="a PagedAttentionCache does not work"),
        ):
            model(ids, **{name: PagedAttentionCache()})


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_ordinary_caches_are_refused_under_either_name(model: PreTrainedModel, ids: Tensor, name: str) -> None:
    with duo_attention(model, mask_for(model)), pytest.raises(UserError, match="DynamicCache does not work"):
        model(ids, use_cache=True, **{name: DynamicCache(config=model.config)})


# As the caches of transformers


def test_the_largest_static_cache_is_kept(model: PreTrainedModel, ids: Tensor) -> None:
    """As transformers does, so that a step that was compiled fits the next, shorter call."""
    options = {"cache_implementation": "static", "do_sample": False, "return_dict_in_generate": True}
    with duo_attention(model, mask_for(model)):
        lengths = [
            cache_of(model.generate(ids, max_new_tokens=new, **options)).max_length for new in (8, 20, 3, 20, 25)
        ]
    assert lengths == [47, 59, 59, 59, 64]


def test_a_cache_says_what_it_has(model: PreTrainedModel, ids: Tensor) -> None:
    with duo_attention(model, mask_for(model)):
        for max_length in (None, 60):
            cache = dual_cache(model, max_length)
            first = cache.layers[0]
            assert (first.keys, first.values, first.device, first.dtype) == (None,) * 4
            model(ids, past_key_values=cache)
            assert (cache.layers[0].device, cache.layers[0].dtype) == (torch.device("cpu"), torch.float32)
            assert cache.max_cache_len == (max_length or -1)
            for name in ("keys", "values"):
                with pytest.raises(UserError, match=r"layer\.full\.key"):
                    getattr(cache.layers[0], name)
        with pytest.raises(UserError, match="static cache cannot be offloaded"):
            cache.offload()


@masks
def test_an_offloaded_cache_comes_back(model: PreTrainedModel, ids: Tensor, kind: str) -> None:
    with duo_attention(model, mask_for(model, kind=kind)), torch.no_grad():
        expected = model(ids).logits[:, 30:]
        cache = dual_cache(model)
        model(ids[:, :30], past_key_values=cache)
        cache.offload()
        with pytest.raises(UserError, match=r"cache.prefetch\(\) first"):
            model(ids[:, 30:], past_key_values=cache)
        cache.prefetch()
        check_equal(model(ids[:, 30:], past_key_values=cache).logits, expected)


# Tokens that are hidden


@pytest.mark.parametrize("cache_implementation", [None, "static"])
def test_the_pad_token_in_a_prompt_is_hidden_as_generate_hides_it(cache_implementation: str | None) -> None:
    """With no mask given, generate takes each pad token for padding, also in the middle."""
    model = build("llama", pad_token_id=7)
    ids = random_ids(1, 30).clamp(min=8)
    ids[0, [10, 20]] = 7
    options = {"max_new_tokens": 6, "do_sample": False, "cache_implementation": cache_implementation}
    expected = model.generate(ids, **options)[:, 30:]
    with duo_attention(model, mask_for(model, kind="all")):
        assert torch.equal(model.generate(ids, **options)[:, 30:], expected)
    with duo_attention(model, mask_for(model)):
        shorter = ids[:, ids[0] != 7]
        assert torch.equal(model.generate(ids, **options)[:, 30:], model.generate(shorter, **options)[:, 28:])


@pytest.mark.parametrize("new", [1, 4])  # with one, a static cache is as long as the prompt
@pytest.mark.parametrize("cache_implementation", [None, "static"])
def test_generate_pads_on_the_right_too(cache_implementation: str | None, new: int) -> None:
    model, ids = build("llama"), random_ids(2, 15)
    real = torch.ones_like(ids)
    real[0, 8:] = 0
    with duo_attention(model, mask_for(model)):
        made = model.generate(
            ids, attention_mask=real, max_new_tokens=new, do_sample=False, return_dict_in_generate=True,
            cache_implementation=cache_implementation,
        )  # fmt: skip
        assert cache_of(made).tokens.lengths.tolist() == [8 + new - 1, 15 + new - 1]
        alone = model.generate(ids[1:], max_new_tokens=new, do_sample=False)
    assert torch.equal(made.sequences[1], alone[0])


@pytest.mark.parametrize(
    ("family", "max_length"), [("llama", None), ("gpt_neox", 90), ("gemma3_text", None), ("gemma3_text", 90)]
)
def test_turns_of_a_batched_chat(family: str, max_length: int | None) -> None:
    """Three turns whose rows have other lengths, through generate: each row writes what it writes alone."""
    model = build(family)
    turns, draw = [], torch.Generator().manual_seed(3)
    for lengths in ((12, 8), (3, 6), (1, 5)):
        ids = torch.randint(3, 90, (2, max(lengths)), generator=draw)
        real = torch.ones_like(ids)
        for row, length in enumerate(lengths):
            real[row, : max(lengths) - length] = 0
        turns.append((ids, real))
    options: dict[str, Any] = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    with duo_attention(model, mask_for(model)), torch.no_grad():
        cache = dual_cache(model, max_length)
        ids, real = (torch.zeros(2, 0, dtype=torch.long) for _ in range(2))
        texts = [torch.zeros(0, dtype=torch.long)] * 2
        for new, mask in turns:
            ids, real = torch.cat([ids, new], 1), torch.cat([real, mask], 1)
            ids = model.generate(ids, attention_mask=real, **{GENERATE_CACHE: cache}, **options)
            real = torch.cat([real, torch.ones(2, 4, dtype=torch.long)], 1)
            for row in range(2):
                text = torch.cat([texts[row], new[row][mask[row].bool()]])[None]
                texts[row] = model.generate(text, attention_mask=torch.ones_like(text), **options)[0]
                assert torch.equal(ids[row, -4:], texts[row][-4:])


@pytest.mark.parametrize("max_length", [None, 90])
def test_a_mask_that_hides_the_past_is_refused_by_generate_too(
    model: PreTrainedModel, ids: Tensor, max_length: int | None
) -> None:
    with duo_attention(model, mask_for(model)), torch.no_grad():
        cache = dual_cache(model, max_length)
        model(ids, past_key_values=cache)
        more = torch.cat([ids, ids[:, :1]], 1)
        hidden = torch.ones_like(more)
        hidden[0, 30:33] = 0
        with pytest.raises(UserError, match="hides cached tokens"):
            model.generate(more, attention_mask=hidden, max_new_tokens=3, **{GENERATE_CACHE: cache})
        hidden[0, 30:33] = 1
        model.generate(more, attention_mask=hidden, max_new_tokens=3, **{GENERATE_CACHE: cache})


@pytest.mark.parametrize("chunk", [1, 4, 100])
def test_prefill_returns_each_samples_last_token(model: PreTrainedModel, chunk: int) -> None:
    ids = random_ids(3, 30)
    real = torch.ones_like(ids)
    real[0, 21:], real[1, :5], real[2, 3:] = 0, 0, 0
    with duo_attention(model, mask_for(model)):
        found = prefill(model, ids, dual_cache(model), chunk, real)
        for row, mask in enumerate(real):
            check_equal(found[row], prefill(model, ids[row : row + 1, mask.bool()], dual_cache(model))[0])
