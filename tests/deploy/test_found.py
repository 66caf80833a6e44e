"""Faults that a reader of the code found: each is right now, or refused by name."""

import copy
import threading
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache

from duo_id import dual_cache, duo_attention, prefill
from duo_id.attention.interface import attached
from duo_id.common.compat import cache_argument
from duo_id.common.errors import UserError
from tests.deploy.cases import build, case, check_equal, mask_for, padded_ids, random_ids, reference
from tests.support.tiny import tiny_model

OPTIONS: dict[str, Any] = {"max_new_tokens": 30, "min_new_tokens": 30, "do_sample": False}


@pytest.mark.parametrize("chunk", [5, 8, 9, 16])
@pytest.mark.parametrize("max_length", [None, 60])
def test_a_first_chunk_of_padding_alone(chunk: int, max_length: int | None) -> None:
    given, ids = case("llama"), random_ids(2, 40)
    real = torch.ones_like(ids)
    real[0, :9] = real[1, :12] = 0
    positions = (real.cumsum(-1) - 1).clamp(min=0)
    with reference(given.model, given.mask):
        expected = given.model(ids, attention_mask=real, position_ids=positions, use_cache=False).logits[:, -1]
    with duo_attention(given.model, given.mask), torch.no_grad():
        check_equal(prefill(given.model, ids, dual_cache(given.model, max_length), chunk, real), expected)


@pytest.mark.parametrize("count", [9, 10, 12, 13])
def test_crop_by_more_than_a_window(count: int) -> None:
    """The window is 8: what is taken back beyond it comes from what was recorded alone."""
    given, ids = case("llama"), random_ids(1, 80)
    with duo_attention(given.model, given.mask), torch.no_grad():
        expected = given.model(ids, use_cache=False).logits
        cache = dual_cache(given.model)
        cache.activate_past_recording(12)
        given.model(ids[:, :50], past_key_values=cache)
        cache.crop(-count)
        found = given.model(ids[:, 50 - count : 70], past_key_values=cache).logits
    check_equal(found, expected[:, 50 - count : 70])


@pytest.mark.parametrize(
    ("family", "recent", "drafted"),
    [
        *(("llama", recent, drafted) for recent, drafted in ((8, 10), (2, 4), (4, 60), (40, 100))),
        ("gemma3_text", 4, 60),
    ],
)
def test_drafts_longer_than_a_window(family: str, recent: int, drafted: int) -> None:
    model, base = build(family), random_ids(1, 20)
    ids = torch.cat([base, random_ids(1, 30, seed=9), base[:, :4]], 1)
    with duo_attention(model, mask_for(model, 1, recent)):
        wanted = model.generate(ids, **OPTIONS)
        assert torch.equal(model.generate(ids, prompt_lookup_num_tokens=drafted, **OPTIONS), wanted)


def test_drafts_longer_than_what_is_usually_recorded() -> None:
    model, base = build("llama"), random_ids(1, 160)
    ids = torch.cat([base, random_ids(1, 30, seed=9), base[:, :4]], 1)
    with duo_attention(model, mask_for(model, 1, 8)):
        wanted = model.generate(ids, **OPTIONS)
        assert torch.equal(model.generate(ids, prompt_lookup_num_tokens=150, **OPTIONS), wanted)


def test_a_model_that_shares_a_config_is_refused_or_right() -> None:
    for family in ("llama", "gemma3_text"):
        model, ids = build(family), random_ids(2, 40)
        other = type(model)(model.config).eval().requires_grad_(False)
        expected = other(ids, use_cache=False).logits
        with duo_attention(model, mask_for(model)):
            with pytest.raises(UserError, match="shares its config"):
                other(ids, use_cache=False)
            with pytest.raises(UserError, match="shares its config"):
                other(ids, past_key_values=DynamicCache(config=other.config))
            made = AutoModelForCausalLM.from_config(copy.deepcopy(model.config))
            with pytest.raises(UserError, match="set_attn_implementation"):
                made(ids)
            made.set_attn_implementation("sdpa")
            made(ids)
        assert torch.equal(other(ids, use_cache=False).logits, expected)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda key, value: (key, value * 2), "changes its values"),
        (lambda key, value: (key * 2, value), "changes its keys"),
        (lambda key, value: (key[:, :, -4:], value), "changes its keys"),
        (lambda key, value: (torch.cat([key, key], 2), value), "changes its keys"),
    ],
    ids=["values", "keys", "fewer", "more"],
)
def test_what_changes_behind_the_cache_is_refused(change: Any, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = build("llama"), random_ids(1, 20)
    with duo_attention(model, mask_for(model)):
        cache = dual_cache(model)
        plain = cache.update
        monkeypatch.setattr(cache, "update", lambda *args, **options: change(*plain(*args, **options)))
        with pytest.raises(UserError, match=reason):
            model(ids, past_key_values=cache)


def test_a_window_in_the_mask_alone_is_refused_in_a_hybrid_too() -> None:
    model = build("gemma3_text", sliding_window=300, max_position_embeddings=1024)
    for layer in model.model.layers:
        layer.self_attn.sliding_window = None
    with pytest.raises(UserError, match="300 tokens that its layers do not report"), attached(model):
        pass


def test_a_part_called_by_itself_with_a_cache_is_refused() -> None:
    given, (ids, real, positions) = case("llama"), padded_ids()
    with duo_attention(given.model, given.mask), torch.no_grad():
        cache = dual_cache(given.model)
        options = {"attention_mask": real, "position_ids": positions, cache_argument(given.model.model): cache}
        with pytest.raises(UserError, match="a submodule was called on its own"):
            given.model.model.forward(ids, **options)
        check_equal(given.model(ids, **options).logits[1, 48:], given.padded_logits[1, 48:])


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints_and_a_backward_pass_after_the_block(reentrant: bool) -> None:
    model, ids = build("llama").requires_grad_(True), random_ids(1, 24)
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    with duo_attention(model, mask_for(model)):
        loss = model(ids, labels=ids).loss
        model(ids, labels=ids).loss.backward()
    with pytest.raises(UserError, match="inside the duo_attention block"):
        loss.backward()


@pytest.mark.parametrize("use_cache", [False, True])
def test_packed_sequences_are_refused(use_cache: bool) -> None:
    model, ids = build("llama"), random_ids(1, 40)
    packed = torch.cat([torch.arange(20), torch.arange(20)])[None]
    with duo_attention(model, mask_for(model)), pytest.raises(UserError, match="packed sequences"):
        model(ids, position_ids=packed, use_cache=use_cache)


def test_attention_weights_that_a_config_asks_for_are_refused() -> None:
    model = build("llama")
    model.set_attn_implementation("eager")
    model.config.output_attentions = True
    with duo_attention(model, mask_for(model)), pytest.raises(UserError, match="output_attentions"):
        model(random_ids(1, 9))


@pytest.mark.parametrize("use_cache", [False, True])
def test_a_mask_that_goes_on_beyond_the_text_or_does_not_reach_it(use_cache: bool) -> None:
    given, ids = case("llama"), random_ids(2, 40)
    longer = torch.ones(2, 50, dtype=torch.long)
    longer[0, :5] = 0
    with duo_attention(given.model, given.mask), torch.no_grad():
        expected = given.model(ids, attention_mask=longer[:, :40], use_cache=use_cache).logits
        found = given.model(ids, attention_mask=longer, use_cache=use_cache).logits
        check_equal(found[0, 5:], expected[0, 5:])
        check_equal(found[1], expected[1])
        for wrong in (longer[:, :30], longer[:1, :40], longer[:, :0]):
            with pytest.raises(UserError, match="attention_mask"):
                given.model(ids, attention_mask=wrong, use_cache=use_cache)


@pytest.mark.parametrize("what", ["fork", "repeat", "record", "move"])
def test_what_is_made_in_inference_mode_serves_outside(what: str) -> None:
    given, ids = case("llama"), random_ids(2, 40)
    with duo_attention(given.model, given.mask), torch.no_grad():
        cache = dual_cache(given.model)
        given.model(ids[:, :30], past_key_values=cache)
        with torch.inference_mode():
            if what == "fork":
                cache = cache.fork(torch.tensor([0, 1]))
            elif what == "repeat":
                cache.batch_repeat_interleave(1)
            elif what == "record":
                cache.activate_past_recording(20)
            else:
                cache.offload()
                cache.prefetch()
        expected = given.model(ids, use_cache=False).logits[:, 30:]
        check_equal(given.model(ids[:, 30:], past_key_values=cache).logits, expected)


def test_two_threads_attach_two_models() -> None:
    errors: list[BaseException] = []

    def attach() -> None:
        try:
            for _ in range(6):
                model = tiny_model("llama")
                with duo_attention(model, mask_for(model)):
                    model(random_ids(1, 9))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=attach) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors


def test_weights_that_accelerate_keeps_elsewhere() -> None:
    from accelerate import cpu_offload

    model, ids = build("llama"), random_ids(1, 20)
    mask = mask_for(model)
    with duo_attention(model, mask):
        expected = model(ids, use_cache=False).logits
    moved = cpu_offload(copy.deepcopy(model))
    with duo_attention(moved, mask):
        check_equal(moved(ids).logits, expected)


def test_mixed_precision_of_accelerate_leaves_caches_alone() -> None:
    from accelerate.utils import convert_outputs_to_fp32

    model, ids = build("llama").bfloat16(), random_ids(1, 20)
    with duo_attention(model, mask_for(model)), torch.no_grad():
        output = convert_outputs_to_fp32(model)(ids)
    assert output.logits.dtype == torch.float32


def test_what_does_not_run_on_text_alone_is_named() -> None:
    model = tiny_model("gpt2", max_position_embeddings=3)
    with pytest.raises(UserError, match="does not run on 4 tokens of plain text"), attached(model):
        pass


def test_an_implementation_that_is_not_there_is_named() -> None:
    model = build("llama")
    model.config._attn_implementation_internal = "flash_attention_9"
    with pytest.raises(UserError, match=r"flash_attention_9|does not run"), attached(model):
        pass


@pytest.mark.parametrize(
    "call",
    [
        lambda cache: cache.crop("a"),
        lambda cache: cache.crop(-1.5),
        lambda cache: cache.activate_past_recording(0),
        lambda cache: cache.activate_past_recording(True),
        lambda cache: cache.activate_past_recording(2.5),
    ],
    ids=["text", "fraction", "none", "bool", "half"],
)
def test_arguments_of_a_cache_that_cannot_be(call: Any) -> None:
    given = case("llama")
    with duo_attention(given.model, given.mask), torch.no_grad():
        cache = dual_cache(given.model)
        given.model(random_ids(1, 9), past_key_values=cache)
        with pytest.raises(UserError, match=r"whole number|number of tokens"):
            call(cache)


def test_recording_more_begins_anew() -> None:
    given, ids = case("llama"), random_ids(1, 60)
    with duo_attention(given.model, given.mask), torch.no_grad():
        expected = given.model(ids, use_cache=False).logits
        cache = dual_cache(given.model)
        given.model(ids[:, :20], past_key_values=cache)
        cache.activate_past_recording(2)
        given.model(ids[:, 20:30], past_key_values=cache)
        cache.activate_past_recording(9)
        cache.activate_past_recording(4)
        given.model(ids[:, 30:38], past_key_values=cache)
        cache.crop(-8)
        check_equal(given.model(ids[:, 30:], past_key_values=cache).logits, expected[:, 30:])


def test_generate_in_chunks_of_padding() -> None:
    given, ids = case("llama", "all"), random_ids(2, 40)
    real = torch.ones_like(ids)
    real[0, :9] = real[1, :12] = 0
    options = {"attention_mask": real, "max_new_tokens": 8, "do_sample": False}
    wanted = given.model.generate(ids, **options)
    with duo_attention(given.model, given.mask):
        assert torch.equal(given.model.generate(ids, prefill_chunk_size=8, **options), wanted)
