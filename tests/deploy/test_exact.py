"""A model under a head mask computes what brute force computes, however its tokens come in."""

import functools
import itertools
from typing import Any

import pytest
import torch
from transformers import set_seed

from duo_id import dual_cache, duo_attention, prefill
from duo_id.patterns.spans import ALL, HeadSpans
from tests.deploy.cases import (
    EVERY_FAMILY,
    HYBRIDS,
    LENGTHS,
    PROMPT,
    RECENT,
    SINK,
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
from tests.support.pairs import pairwise, pairwise_of_some

# Grouped heads, a head each, learned positions, sliding layers.
SOME = ("llama", "gpt_neox", "gpt2", "gemma3_text")
CHUNKS = (1, 7, 40, PROMPT)
KINDS = (None, TOKENS)  # a cache that grows, and a static one that is full at the end
MASKS = ("mixed", "spans")
SMALL = ((0, 1), (0, 5), (1, 1), (7, 1))  # sizes of the sink and the window
masks = pytest.mark.parametrize("kind", MASKS)


@pairwise(family=SOME, kind=MASKS)
def test_without_a_cache_and_with_the_models_own(kind: str, family: str) -> None:
    given = case(family, kind)
    with duo_attention(given.model, given.mask):
        check_equal(given.model(given.ids, use_cache=False).logits, given.logits)
        output = given.model(given.ids[:, :PROMPT], use_cache=True)
        check_equal(output.logits, given.logits[:, :PROMPT])
        for token in range(PROMPT, TOKENS):
            output = given.model(given.ids[:, token : token + 1], past_key_values=output.past_key_values)
            check_equal(output.logits, given.logits[:, token : token + 1])


@pairwise(family=[*SOME, "gpt_oss"], chunk=CHUNKS, max_length=KINDS, kind=MASKS)
def test_a_growing_and_a_static_cache(kind: str, family: str, chunk: int, max_length: int | None) -> None:
    """The first prompt of `test_left_padding`, which has every family, is not padded either."""
    given = case(family, kind)
    with duo_attention(given.model, given.mask):
        check_equal(run(given.model, given.ids, dual_cache(given.model, max_length), chunk), given.logits)


@pairwise(kind=["all", "none", "long"], max_length=KINDS, family=["llama", "gemma3_text"])
def test_layers_where_all_or_no_heads_are_retrieval_heads(family: str, max_length: int | None, kind: str) -> None:
    given = case(family, kind)
    with duo_attention(given.model, given.mask):
        check_equal(run(given.model, given.ids, dual_cache(given.model, max_length), 7), given.logits)


@pytest.mark.parametrize(
    ("sink", "recent", "chunk"),
    [
        *((sink, recent, 1) for sink, recent in SMALL),
        *((sink, recent, chunk) for sink, recent in (*SMALL, (1, 40), (40, 3), (55, 30)) for chunk in (7, PROMPT)),
    ],
)
def test_windows_of_any_size(sink: int, recent: int, chunk: int) -> None:
    given = case("llama", "mixed", sink, recent)
    with duo_attention(given.model, given.mask):
        if chunk != 7:
            check_equal(run(given.model, given.ids, dual_cache(given.model), chunk), given.logits)
        else:  # of the padded prompts the first is as long
            padded, real, _ = padded_ids()
            found = run(given.model, padded, dual_cache(given.model), chunk, real)
            check_equal(found[real == 1], given.padded_logits[real == 1])


@pytest.mark.parametrize("hidden", [-1, 0, 1, 2])
def test_a_static_cache_about_as_long_as_a_window(hidden: int) -> None:
    """Where a window hides nothing of the longest text, its head keeps all of it; where it hides one token, a ring."""
    model, ids = build("llama"), random_ids(2, TOKENS)
    mask = HeadSpans(torch.tensor([[TOKENS - SINK - hidden, ALL], [TOKENS - SINK - hidden, RECENT]] * 2), SINK)
    with reference(model, mask):
        expected = model(ids, use_cache=False).logits
    with duo_attention(model, mask):
        for chunk in (7, PROMPT):
            cache = dual_cache(model, TOKENS)
            check_equal(run(model, ids, cache, chunk), expected)
        assert [len(layer.full.heads) for layer in cache.layers] == [1 + (hidden <= 0), int(hidden <= 0)] * 2


VARIANTS = [
    {"head_dim": 24},
    {"tie_word_embeddings": False},
    {"num_key_value_heads": 1},
    {"hidden_size": 28, "num_attention_heads": 7, "num_key_value_heads": 1, "head_dim": 6},
    {"hidden_size": 36, "num_attention_heads": 12, "num_key_value_heads": 3},
    {"attention_bias": True},
    {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}},
    {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 8.0}},
    {
        "rope_parameters": {
            "rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
        }
    },
]  # fmt: skip


@pairwise_of_some(VARIANTS[:2], changes=VARIANTS, kind=MASKS, chunk=[7, PROMPT])
def test_variants_of_one_family(changes: dict[str, Any], kind: str, chunk: int) -> None:
    model, ids = build("llama", **changes), random_ids(2, TOKENS)
    mask = mask_for(model, kind=kind)
    with reference(model, mask):
        expected = model(ids, use_cache=False).logits
    with duo_attention(model, mask):
        check_equal(run(model, ids, dual_cache(model), chunk), expected)


@masks
@pytest.mark.parametrize("chunks", [[300], [150, 150], [2, 298], [299, 1], [130, 7, 163]], ids=str)
def test_chunks_longer_than_the_blocks_of_streaming_attention(chunks: list[int], kind: str) -> None:
    model, ids = build("llama"), random_ids(1, 300)
    mask = mask_for(model, kind=kind)
    with reference(model, mask):
        expected = model(ids, use_cache=False).logits
    with duo_attention(model, mask):
        cache = dual_cache(model)
        found = [model(part, past_key_values=cache).logits for part in ids.split(chunks, 1)]
    check_equal(torch.cat(found, 1), expected)


@pairwise_of_some(SOME, family=EVERY_FAMILY, chunk=CHUNKS, max_length=KINDS, kind=MASKS)
def test_left_padding(kind: str, family: str, chunk: int, max_length: int | None) -> None:
    given = case(family, kind)
    padded, real, positions = padded_ids()
    with duo_attention(given.model, given.mask):
        found = run(given.model, padded, dual_cache(given.model, max_length), chunk, real)
        whole = given.model(padded, attention_mask=real, position_ids=positions, use_cache=False).logits
    check_equal(found[real == 1], given.padded_logits[real == 1])
    check_equal(whole[real == 1], given.padded_logits[real == 1])


@pairwise(family=SOME, max_length=KINDS, kind=MASKS)
def test_padding_between_single_tokens(kind: str, family: str, max_length: int | None) -> None:
    """A sample that waits while others go on, then goes on itself, as if nothing had been."""
    given, ids = case(family, kind), random_ids(2, TOKENS)
    real = torch.ones_like(ids)
    real[0, PROMPT + 1 : PROMPT + 4] = 0
    real[1, PROMPT + 2 : PROMPT + 12] = 0
    positions = (real.cumsum(-1) - 1).clamp(min=0)
    with reference(given.model, given.mask):
        expected = given.model(ids, attention_mask=real, position_ids=positions, use_cache=False).logits
    with duo_attention(given.model, given.mask):
        found = run(given.model, ids, dual_cache(given.model, max_length), PROMPT, real)
    check_equal(found[real == 1], expected[real == 1])


@pairwise(family=SOME, max_length=KINDS, kind=MASKS)
def test_a_padded_sample_is_as_if_it_were_alone(kind: str, family: str, max_length: int | None) -> None:
    given = case(family, kind)
    padded, real, _ = padded_ids()
    with duo_attention(given.model, given.mask):
        found = run(given.model, padded, dual_cache(given.model, max_length), 7, real)
        for sample, length in enumerate(LENGTHS):
            row = padded[sample : sample + 1, PROMPT - length :]
            alone = given.model(row, past_key_values=dual_cache(given.model, max_length)).logits
            check_equal(found[sample, PROMPT - length :], alone[0])


@pairwise(family=SOME, chunk=CHUNKS[1:], padded=[False, True], kind=MASKS)
def test_prefill_returns_the_last_logits(kind: str, family: str, chunk: int, padded: bool) -> None:
    given, real = case(family, kind), None
    ids, expected = given.ids, given.logits
    if padded:
        ids, real, _ = padded_ids()
        expected = given.padded_logits
    with duo_attention(given.model, given.mask):
        cache = dual_cache(given.model)
        first = prefill(given.model, ids[:, :30], cache, chunk, None if real is None else real[:, :30])
        check_equal(first[:2], expected[:2, 29])  # of the third sample none has come yet
        second = prefill(given.model, ids[:, 30:PROMPT], cache, chunk, None if real is None else real[:, :PROMPT])
        check_equal(second, expected[:, PROMPT - 1])
    assert cache.get_seq_length() == PROMPT


NEW = 10  # tokens: the shortest prompt outgrows its window
GENERATION = {
    "greedy": {},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "sampling": {"do_sample": True, "temperature": 1.5, "top_k": 20, "top_p": 0.9},
    "several samples": {"do_sample": True, "num_return_sequences": 2},
    "sampled beams": {"do_sample": True, "num_beams": 2},
}


def generate(model: Any, **options: Any) -> Any:
    """Ten tokens after a padded batch, and the scores that they were chosen by."""
    ids, real, _ = padded_ids()
    set_seed(0)
    return model.generate(
        ids[:, :PROMPT], attention_mask=real[:, :PROMPT], max_new_tokens=NEW, output_scores=True,
        return_dict_in_generate=True, **{"do_sample": False} | options,
    )  # fmt: skip


@functools.cache
def expected_generation(family: str, kind: str, way: str) -> Any:
    given = case(family, kind)
    with reference(given.model, given.mask):
        return generate(given.model, use_cache=False, **GENERATION[way])


def check_generation(found: Any, expected: Any) -> None:
    assert found.sequences.tolist() == expected.sequences.tolist()
    for ours, theirs in zip(found.scores, expected.scores, strict=True):
        finite = theirs.isfinite()
        assert torch.equal(ours.isfinite(), finite)
        check_equal(ours[finite], theirs[finite])


@pairwise_of_some(SOME, family=EVERY_FAMILY, cache=[None, "static"], kind=MASKS)
def test_greedy_generation(kind: str, family: str, cache: str | None) -> None:
    """Each token is the likeliest, as the reference finds it after the tokens before."""
    given = case(family, kind)
    with duo_attention(given.model, given.mask):
        found = generate(given.model, **({} if cache is None else {"cache_implementation": cache}))
        assert type(found.past_key_values).__name__ == "DualCache"
        assert (found.past_key_values.max_length is None) == (cache != "static")
    ids, (_, real, _) = found.sequences[:, :-1], padded_ids()
    real = torch.cat([real[:, :PROMPT], torch.ones_like(ids[:, PROMPT:])], 1)
    positions = (real.cumsum(-1) - 1).clamp(min=0)
    with reference(given.model, given.mask):
        logits = given.model(ids, attention_mask=real, position_ids=positions, use_cache=False).logits
    expected = logits[:, PROMPT - 1 :]
    check_equal(torch.stack(found.scores, 1), expected)
    goes_on = (ids[:, PROMPT - 1 :] != given.model.config.eos_token_id).cumprod(1).bool()
    assert goes_on.sum() >= 2 * NEW
    assert torch.equal(found.sequences[:, PROMPT:][goes_on], expected.argmax(-1)[goes_on])


@pairwise(way=GENERATION, cache=["dynamic", "static", "no"], family=["llama", "gemma3_text"], kind=MASKS)
def test_other_generation(kind: str, way: str, cache: str, family: str) -> None:
    given = case(family, kind)
    options = {"use_cache": False} if cache == "no" else {"cache_implementation": cache}
    with duo_attention(given.model, given.mask):
        check_generation(generate(given.model, **options, **GENERATION[way]), expected_generation(family, kind, way))


@pairwise(family=["gpt2", "gemma3_text"], max_length=[None, 200], kind=MASKS)
def test_generation_goes_on_from_a_cache_that_is_given(kind: str, family: str, max_length: int | None) -> None:
    """A second call with the cache of the first: only the new tokens run."""
    given, seen = case(family, kind), []
    with reference(given.model, given.mask):
        first = generate(given.model, use_cache=False).sequences
        ids = torch.cat([first, random_ids(3, 5)], 1)
        real = torch.cat([padded_ids()[1][:, :PROMPT], torch.ones(3, ids.shape[1] - PROMPT, dtype=torch.long)], 1)
        expected = given.model.generate(ids, attention_mask=real, max_new_tokens=8, do_sample=False, use_cache=False)
    with duo_attention(given.model, given.mask):
        cache = dual_cache(given.model, max_length)
        assert torch.equal(generate(given.model, past_key_values=cache).sequences, first)
        hook = given.model.get_input_embeddings().register_forward_pre_hook(
            lambda module, args: seen.append(args[0].shape[1])
        )
        found = given.model.generate(ids, attention_mask=real, max_new_tokens=8, do_sample=False, past_key_values=cache)
        hook.remove()
    assert found.tolist() == expected.tolist()
    assert max(seen) == 6, "the token that was not run yet and the five new ones"


@masks
def test_prompts_are_generated_from_in_chunks(kind: str) -> None:
    given = case("llama", kind)
    with duo_attention(given.model, given.mask):
        expected = generate(given.model)
        check_generation(generate(given.model, prefill_chunk_size=9), expected)


@pytest.mark.parametrize("family", SOME)
def test_a_wrong_span_is_caught(family: str) -> None:
    """One head that sees one token more or less than it should."""
    given = case(family, "spans")
    spans = given.mask.spans
    heads = ((spans > 1) & (spans < TOKENS)).nonzero().tolist()
    assert heads
    for (layer, head), change in itertools.product(heads, (-1, 1)):
        wrong = spans.clone()
        wrong[layer, head] += change
        with duo_attention(given.model, HeadSpans(wrong, SINK, given.mask.gated_layers)):
            found = given.model(given.ids).logits
        with pytest.raises(AssertionError, match="error"):
            check_equal(found, given.logits)


@pytest.mark.parametrize("family", EVERY_FAMILY)
def test_a_wrong_mask_is_caught(family: str) -> None:
    """The reference itself tells masks and windows apart, by far more than the error that is allowed."""
    given = case(family)
    right = given.mask
    retrieval = right.retrieval.clone()
    retrieval[right.gated_layers[0]] ^= True
    wrong = [(retrieval, SINK, RECENT)]
    for sink, recent in ((SINK - 1, RECENT), (SINK + 1, RECENT), (SINK, RECENT - 1), (SINK, RECENT + 1)):
        wrong.append((right.retrieval, sink, recent))
    for heads, sink, recent in wrong:
        other = type(right)(heads, sink, recent, right.gated_layers)
        with duo_attention(given.model, other):
            found = given.model(given.ids).logits
        with pytest.raises(AssertionError, match="error"):
            check_equal(found, given.logits)
        assert (found - given.logits).abs().max() > 1e-3


@pairwise(family=SOME, side=["left", "right"], kind=MASKS)
def test_padding_on_either_side_of_a_chunk(kind: str, family: str, side: str) -> None:
    given, ids = case(family, kind), random_ids(2, 40)
    real = torch.ones_like(ids)
    real[1, slice(0, 13) if side == "left" else slice(27, 40)] = 0
    positions = (real.cumsum(-1) - 1).clamp(min=0)
    with reference(given.model, given.mask):
        expected = given.model(ids, attention_mask=real, position_ids=positions, use_cache=False).logits
    with duo_attention(given.model, given.mask):
        for use_cache in (False, True):
            found = given.model(ids, attention_mask=real, position_ids=positions, use_cache=use_cache).logits
            check_equal(found[real == 1], expected[real == 1])


@pytest.mark.parametrize("family", HYBRIDS)
def test_sliding_layers_keep_their_window(family: str) -> None:
    """They have no gate: a mask that keeps all heads in full is the untouched model, sliding windows and all."""
    given = case(family, "all")
    expected = given.model(given.ids, use_cache=False).logits
    check_equal(given.logits, expected)
    with duo_attention(given.model, given.mask):
        cache = dual_cache(given.model)
        check_equal(run(given.model, given.ids, cache, 7), expected)
    assert [layer.full.key.shape[1] for layer in cache.layers] == [0, 2, 0, 2]
    assert [[(ring.window.recent_size, ring.slots) for ring in x.recent.rings] for x in cache.layers] == [
        [(9, 9)],
        [],
    ] * 2


@pytest.mark.parametrize("family", EVERY_FAMILY)
def test_with_all_heads_in_full_the_model_is_untouched(family: str) -> None:
    given = case(family, "all")
    way = generate if family in SOME else lambda model: model(given.ids).logits
    expected = way(given.model)
    with duo_attention(given.model, given.mask):
        found = way(given.model)
    (check_generation if family in SOME else check_equal)(found, expected)


@pytest.mark.parametrize("max_length", KINDS)
def test_in_bfloat16_nothing_but_rounding_differs(max_length: int | None) -> None:
    model = build("llama").bfloat16()
    mask, ids = mask_for(model), random_ids(2, TOKENS)
    with reference(model, mask):
        expected = model(ids, use_cache=False).logits.float()
    with duo_attention(model, mask):
        cache = dual_cache(model, max_length)
        found = run(model, ids, cache, 7)
    assert found.dtype == cache.layers[0].full.key.dtype == torch.bfloat16
    assert (found.float() - expected).norm() / expected.norm() < 5e-2


@masks
@pytest.mark.parametrize("max_length", KINDS)
def test_a_model_that_is_not_frozen_and_records_gradients(kind: str, max_length: int | None) -> None:
    given = case("llama", kind)
    model = build("llama").requires_grad_(True)
    with duo_attention(model, given.mask):
        with torch.enable_grad():
            found = run(model, given.ids, dual_cache(model, max_length), 7)
        check_equal(found.detach(), given.logits)
