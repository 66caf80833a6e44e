"""Caches of codes compute what brute force computes from what the codes mean, and say how large they are.

Groups have 16 tokens here, not 128, so that short texts have several. Models are in float64: a number that float32
rounds the other way can become another code, which is no error of the cache.
"""

import functools
import io
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from duo_id import DualCache, HeadMask, dual_cache, duo_attention, prefill
from duo_id.attention import codes
from duo_id.attention.codes import FORMATS, Bits, Kv, bits_by_layer
from duo_id.common.errors import UserError
from duo_id.deploy.cache_memory import cache_bytes
from duo_id.patterns.spans import HeadSpans
from tests.deploy.cases import (
    GROUP,
    HYBRID,
    LENGTHS,
    PROMPT,
    SINK,
    TOKENS,
    build,
    check_equal,
    mask_for,
    padded_ids,
    random_ids,
    reference,
    run,
    short_groups,
)
from tests.deploy.reference import Coded
from tests.support.pairs import pairwise
from tests.support.tiny import tiny_model

FAMILIES = ("gpt2", "gemma2", "gemma3_text", "gpt_oss")  # a head each, soft caps, sliding windows, sinks
kvs = pytest.mark.parametrize("kv", ["int8", "k8v4", "int4"])
some_kvs = pytest.mark.parametrize("kv", ["int8", "int4"])
room = pytest.mark.parametrize("max_length", [None, TOKENS])


@pytest.fixture(autouse=True)
def groups(monkeypatch: pytest.MonkeyPatch) -> None:
    short_groups(monkeypatch)


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@functools.cache
def model_of(family: str) -> PreTrainedModel:
    model = build(family).double()
    if hasattr(model.config, "num_local_experts"):
        model.set_experts_implementation("eager")  # others take no float64
    return model


def bits_of(kv: str) -> Bits:
    bits = FORMATS[kv]
    assert bits is not None
    return bits


def pasts(real: Tensor, edges: list[int]) -> Tensor:
    """The real tokens before the forward that each column comes in; forwards begin at `edges`."""
    starts = torch.tensor([max(edge for edge in edges if edge <= column) for column in range(real.shape[1])])
    before = torch.cat([real.new_zeros(len(real), 1), real.cumsum(-1)], 1)
    return before[:, starts]


def edges_of(chunk: int, tokens: int = TOKENS) -> list[int]:
    """Where the forwards of `run` begin."""
    return [*range(0, PROMPT, chunk), *range(PROMPT, tokens)]


def expected(
    model: PreTrainedModel,
    mask: HeadMask | HeadSpans,
    kv: Kv,
    ids: Tensor,
    edges: list[int],
    real: Tensor | None = None,
) -> Tensor:
    """The reference's logits of the whole sequence, whose forwards begin at `edges`."""
    past = pasts(torch.ones_like(ids) if real is None else real, edges)
    options = {}
    if real is not None:
        options = {"attention_mask": real, "position_ids": (real.cumsum(-1) - 1).clamp(min=0)}
    with reference(model, mask, Coded(bits_by_layer(kv, model.config.num_hidden_layers), GROUP, past)):
        return model(ids, use_cache=False, **options).logits


@pairwise(
    place=[("llama", 1, "mixed"), ("llama", 7, "spans"), ("llama", 40, "mixed"), *((x, 7, "mixed") for x in FAMILIES)],
    max_length=[None, TOKENS],
    kv=["int8", "int4"],
)
def test_chunks_and_steps(place: tuple[str, int, str], max_length: int | None, kv: str) -> None:
    family, chunk, kind = place
    model, ids = model_of(family), random_ids(2, TOKENS)
    mask = mask_for(model, kind=kind)
    wanted = expected(model, mask, kv, ids, edges_of(chunk))
    with duo_attention(model, mask, kv=kv):
        check_equal(run(model, ids, dual_cache(model, max_length), chunk), wanted)


@room
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_a_format_for_each_layer(family: str, max_length: int | None) -> None:
    model, ids = model_of(family), random_ids(2, TOKENS)
    mask, kv = mask_for(model, kind="all"), ["int4", "exact", "int8", "k8v4"]
    wanted = expected(model, mask, kv, ids, edges_of(7))
    with duo_attention(model, mask, kv=kv):
        cache = dual_cache(model, max_length)
        check_equal(run(model, ids, cache, 7), wanted)
        alone = [dual_cache(model, kv=name) for name in kv]
        for each in (cache, *alone):
            each.fill(2, TOKENS, torch.float64, "cpu")
        found = [layer.retained_bytes(TOKENS) for layer in cache.dual_layers]
        own = [layers.dual_layers[i].retained_bytes(TOKENS) for i, layers in enumerate(alone)]
        assert found == own
    table = cache_bytes(model, {"all": mask}, [TOKENS], kv=kv)
    assert int(table["all"][TOKENS]) == sum(found)


def test_layers_with_codes_limit_what_can_be_removed() -> None:
    model, ids = model_of("llama"), random_ids(1, 50)
    with duo_attention(model, mask_for(model, kind="all"), kv=["exact"] * 3 + ["int4"]):
        cache = dual_cache(model)
        model(ids, past_key_values=cache)
        with pytest.raises(UserError, match=r"crop\(-19\): the first 32 of 50 tokens are kept as codes alone"):
            cache.crop(-19)
        cache.crop(-18)
        with pytest.raises(UserError, match="with codes at most 16 tokens can be removed"):
            cache.activate_past_recording(17)


@pairwise(pieces=[(1, "mixed"), (7, "spans"), (PROMPT, "mixed")], max_length=[None, TOKENS], kv=["int8", "int4"])
def test_left_padding(pieces: tuple[int, str], max_length: int | None, kv: str) -> None:
    chunk, kind = pieces
    model, (ids, real, _) = model_of("llama"), padded_ids()
    mask = mask_for(model, kind=kind)
    wanted = expected(model, mask, kv, ids, edges_of(chunk), real)
    with duo_attention(model, mask, kv=kv):
        found = run(model, ids, dual_cache(model, max_length), chunk, real)
    check_equal(found[real == 1], wanted[real == 1])


@some_kvs
@room
def test_padding_between_single_tokens(max_length: int | None, kv: str) -> None:
    """A sample waits where its group is about to end, then ends it."""
    model, ids = model_of("llama"), random_ids(2, 80)
    mask, real = mask_for(model), torch.ones_like(ids)
    real[0, PROMPT + 14 : PROMPT + 19] = 0
    real[1, PROMPT + 15 : PROMPT + 21] = 0
    wanted = expected(model, mask, kv, ids, edges_of(PROMPT, 80), real)
    with duo_attention(model, mask, kv=kv):
        found = run(model, ids, dual_cache(model, max_length and 80), PROMPT, real)
    check_equal(found[real == 1], wanted[real == 1])


def test_codes_are_seen() -> None:
    """The reference itself tells formats, groups and places apart, by far more than the error that is allowed."""
    model, ids = model_of("llama"), random_ids(2, TOKENS)
    mask = mask_for(model)
    right = expected(model, mask, "int4", ids, edges_of(7))
    assert torch.equal(right[:, :21], expected(model, mask, "int8", ids, edges_of(7))[:, :21]), "no group is complete"
    others = [expected(model, mask, kv, ids, edges_of(7)) for kv in ("int8", "k8v4")]
    others += [expected(model, mask, "int4", ids, edges_of(chunk)) for chunk in (8, 40)]
    assert all((other - right).abs().max() > 1e-3 for other in others)


@some_kvs
@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
def test_prefill_in_slices_of_the_past(padded: bool, kv: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two groups each; a past of three and a half."""
    monkeypatch.setattr("duo_id.deploy.quantised.SLICE", 2 * GROUP)
    monkeypatch.setattr("duo_id.attention.decode_codes.SLICE", 2 * GROUP)
    model, (ids, real, _) = model_of("llama"), padded_ids()
    if not padded:
        ids, real = ids[:2], torch.ones_like(real[:2])
    mask = mask_for(model)
    wanted = expected(model, mask, kv, ids, [0, 50, 57], real)
    with duo_attention(model, mask, kv=kv):
        cache = dual_cache(model)
        prefill(model, ids[:, :50], cache, 50, real[:, :50])
        check_equal(prefill(model, ids[:, 50:57], cache, 7, real[:, :57]), wanted[:, 56])
        check_equal(prefill(model, ids[:, 57:], cache, 1, real), wanted[:, 57])


@pytest.mark.parametrize(("max_length", "kv"), [(None, "k8v4"), (TOKENS, "int4")])
def test_samples_are_reordered_forked_and_reset(max_length: int | None, kv: str) -> None:
    """And go on until a group is complete."""
    model, ids = model_of("llama"), random_ids(2, 52)
    mask, order = mask_for(model), torch.tensor([1, 1])
    wanted = expected(model, mask, kv, ids[order], [0, 39, *range(40, 52)])
    with duo_attention(model, mask, kv=kv):
        cache = dual_cache(model, max_length)
        for _ in range(2):
            model(ids[:, :39], past_key_values=cache)
            forks = [] if max_length else [cache.fork(order)]
            cache.reorder_cache(order)
            for copied in (cache, *forks):
                for start in range(39, 52):
                    part = slice(start, start + 1)
                    logits = model(ids[order, part], past_key_values=copied).logits
                    if start > 39:
                        check_equal(logits, wanted[:, part])
            cache.reset()


@pytest.mark.parametrize(("beams", "kv"), [(1, "int8"), (3, "int4")])
def test_generation_is_that_of_a_static_cache(beams: int, kv: str) -> None:
    model, (ids, real, _) = model_of("llama"), padded_ids()
    options = {"attention_mask": real[:, :PROMPT], "max_new_tokens": 20, "min_new_tokens": 20, "num_beams": beams}
    with duo_attention(model, mask_for(model), kv=kv):
        wanted = model.generate(ids[:, :PROMPT], do_sample=False, cache_implementation="static", **options)
        assert model.generate(ids[:, :PROMPT], do_sample=False, **options).tolist() == wanted.tolist()


@pytest.mark.parametrize(("family", "kv"), [("llama", "int8"), ("gemma3_text", "int4")])
def test_windows_as_large_as_a_static_cache_are_no_codes(family: str, kv: str) -> None:
    """Streaming heads, and layers with a window of their own, keep what they see exactly, whatever room they have."""
    model, ids = model_of(family), random_ids(2, TOKENS)
    mask = mask_for(model)
    spans = torch.full(mask.spans.shape, -1)
    spans[list(mask.gated_layers)] = TOKENS
    wanted = model(ids, use_cache=False).logits
    with duo_attention(model, HeadSpans(spans, SINK, mask.gated_layers), kv=kv):
        cache = dual_cache(model, TOKENS)
        check_equal(run(model, ids, cache, 7), wanted)
        assert all(layer.full.heads.indices == () for layer in cache.dual_layers)
        slots = {slots for layer in cache.dual_layers for slots in layer.recent.slots}
        assert max(slots) <= TOKENS, "no more than there is room for"


def test_bytes_of_short_texts_count_what_is_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codes, "GROUP", 128)
    model = build("llama").bfloat16()
    mask = HeadMask(torch.ones(4, 2, dtype=torch.bool), SINK, 8)
    sizes = {kv: cache_bytes(model, {"all": mask}, [100, 256, 300, 1024], kv=kv)["all"] for kv in ("exact", "int4")}
    assert sizes["int4"][100] == sizes["exact"][100]
    assert (sizes["int4"] > sizes["exact"]).tolist() == [False, True, True, False]
    assert sizes["int4"].is_monotonic_increasing


@kvs
def test_drafts_are_removed_again(kv: str) -> None:
    """Also where they completed a group."""
    model, ids = model_of("llama"), random_ids(2, TOKENS)
    mask = mask_for(model)
    wanted = expected(model, mask, kv, ids, [0, *range(40, TOKENS)])
    with duo_attention(model, mask, kv=kv):
        cache = dual_cache(model)
        with pytest.raises(UserError, match=r"with codes at most 16 tokens can be removed: ask for no more"):
            cache.activate_past_recording(GROUP + 1)
        cache.activate_past_recording(GROUP)
        model(ids[:, :40], past_key_values=cache)
        for token in range(40, TOKENS):
            model(random_ids(2, 12, seed=token), past_key_values=cache)
            cache.crop(-12)
            check_equal(model(ids[:, token : token + 1], past_key_values=cache).logits, wanted[:, token : token + 1])


@pytest.mark.parametrize(("length", "max_length"), [(32, None), (50, TOKENS)])
def test_crop_as_far_as_tokens_are_exact(length: int, max_length: int | None) -> None:
    """To any length from the start of the group before the one that the text is in."""
    model, ids = model_of("llama"), random_ids(2, 80)
    mask = mask_for(model, kind="all")
    with duo_attention(model, mask, kv="k8v4"):
        start = (length // GROUP - 1) * GROUP
        for least in {start, start + GROUP - 1, start + GROUP} - {length}:
            cache = dual_cache(model, max_length and 80)
            model(ids[:, :20], past_key_values=cache)
            model(ids[:, 20:length].flip(1), past_key_values=cache)
            cache.crop(least - length)
            known = torch.cat([ids[:, :20], ids[:, 20:length].flip(1)], 1)[:, :least]
            whole = torch.cat([known, ids[:, least:]], 1)
            edges = [x for x in (0, 20) if x < least] + list(range(least, 80))
            wanted = expected(model, mask, "k8v4", whole, edges)[:, least : least + 20]
            found = [model(whole[:, t : t + 1], past_key_values=cache).logits for t in range(least, least + 20)]
            check_equal(torch.cat(found, 1), wanted)


@room
def test_crop_into_codes_is_refused_and_changes_nothing(max_length: int | None) -> None:
    model, ids = model_of("llama"), random_ids(2, TOKENS)
    mask = mask_for(model, kind="all")
    with duo_attention(model, mask, kv="int4"):
        cache = dual_cache(model, max_length)
        model(ids[:, :50], past_key_values=cache)
        with pytest.raises(UserError, match=r"crop\(-19\): the first 32 of 50 tokens are kept as codes"):
            cache.crop(-19)
        cache.crop(-18)
        with pytest.raises(UserError, match="the first 32 of 50"):
            cache.crop(-1)
        assert cache.get_seq_length() == 32
        assert not cache.is_croppable


@some_kvs
@pytest.mark.parametrize("family", ["gemma3n_text", "gemma4_text"])
def test_layers_that_share_keys(family: str, kv: str) -> None:
    """Both see the past as it was before the chunk, also where the chunk takes the place of the exact tail."""
    pytest.importorskip(f"transformers.models.{family.removesuffix('_text')}")
    from tests.deploy.test_install import SHARED_KV

    model = tiny_model(
        family, num_hidden_layers=4, num_kv_shared_layers=2, layer_types=HYBRID, sliding_window=9, head_dim=16,
        vocab_size_per_layer_input=96, hidden_size_per_layer_input=8, **SHARED_KV[family],
    ).double()  # fmt: skip
    ids, spans = random_ids(2, TOKENS), torch.tensor([[-1, -1], [-1, 8]] * 2)
    for chunk in (7, 40):
        wanted = expected(model, HeadSpans(spans, SINK), kv, ids, edges_of(chunk))
        with duo_attention(model, HeadSpans(spans, SINK, [1]), kv=kv):
            check_equal(run(model, ids, dual_cache(model), chunk), wanted)


@kvs
def test_a_cache_is_offloaded_and_saved(kv: str) -> None:
    model, ids = model_of("llama"), random_ids(2, TOKENS)
    mask = mask_for(model)
    wanted = expected(model, mask, kv, ids, [0, *range(40, TOKENS)])
    with duo_attention(model, mask, kv=kv):
        cache = dual_cache(model)
        model(ids[:, :40], past_key_values=cache)
        cache.offload()
        cache.prefetch()
        for token in range(40, 50):
            check_equal(model(ids[:, token : token + 1], past_key_values=cache).logits, wanted[:, token : token + 1])
        file = io.BytesIO()
        torch.save([layer.full for layer in cache.dual_layers], file)
        file.seek(0)
        for layer, store in zip(cache.dual_layers, torch.load(file, weights_only=False), strict=True):
            layer.full = store
        for token in range(50, TOKENS):
            check_equal(model(ids[:, token : token + 1], past_key_values=cache).logits, wanted[:, token : token + 1])


# Bytes


def formula(kv: str, heads: int, tokens: int, dim: int, itemsize: int) -> int:
    """Codes, a scale and a zero for each channel of keys and each token of values, and what is exact."""
    bits, groups = bits_of(kv), tokens // codes.GROUP
    each_group = codes.GROUP * dim * (bits.keys + bits.values) // 8 + 2 * (dim + codes.GROUP) * itemsize
    return heads * (groups * each_group + 2 * min(tokens, 2 * codes.GROUP) * dim * itemsize)


@kvs
@pytest.mark.parametrize("group", [16, 128])
def test_bytes_are_the_formula(kv: str, group: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codes, "GROUP", group)
    model, tokens = build("llama").bfloat16(), 50_000
    mask = HeadMask(torch.ones(4, 2, dtype=torch.bool), SINK, 8)
    wanted = formula(kv, 8, tokens, 16, 2)
    assert cache_bytes(model, {"all": mask}, [tokens], kv=kv).loc[tokens, "all"] == wanted
    with duo_attention(model, mask, kv=kv):
        for max_length in (None, tokens + 1):
            cache = dual_cache(model, max_length)
            cache.fill(1, tokens, torch.bfloat16, "cpu")
            assert cache.retained_bytes == wanted
            assert wanted <= cache.nbytes <= (1.01 if max_length else 1.02) * wanted
            model(random_ids(1, 1), past_key_values=cache)


def test_bytes_of_a_large_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Llama-3-8B with half of its heads in full, 3.3 million tokens: 53.5 GiB in 4 bits, as counted by hand."""
    monkeypatch.setattr(codes, "GROUP", 128)
    found = formula("int4", 32 * 4, 3_300_000, 128, 2)
    codes_per_token, scales_per_token = 128, 2 * 2 * 2 * 128 / 128
    assert abs(found - 3_300_000 * 128 * (codes_per_token + scales_per_token)) < 1e-3 * found


@pytest.mark.parametrize(("kv", "tokens"), [("exact", 20), ("int4", 32)], ids=["exact", "codes"])
def test_a_step_without_room_that_the_host_does_not_count_is_refused(
    kv: str, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As compiled ones are; codes leave the rest of the group that the last token is in."""
    model = model_of("llama")
    with duo_attention(model, mask_for(model), kv=kv):
        cache = dual_cache(model, max_length=20)
        model(random_ids(2, 20), past_key_values=cache)
        monkeypatch.setattr("duo_id.deploy.counts._host_blind", lambda tensor: True)
        for _ in range(20, tokens):
            model(random_ids(2, 1), past_key_values=cache)
        with pytest.raises(UserError, match=f"has room for {tokens} tokens, not {tokens + 1}: use a larger max_length"):
            model(random_ids(2, 1), past_key_values=cache)


# What is asked for


def test_a_model_and_each_of_its_caches_may_ask_for_a_format() -> None:
    model, ids = model_of("llama"), random_ids(1, 40)
    mask = mask_for(model, kind="all")
    with duo_attention(model, mask, kv="int4"):
        assert model(ids).past_key_values.kv == dual_cache(model).kv == "int4"
        assert isinstance(dual_cache(model, kv="exact"), DualCache)
        sizes = []
        for kv in ("exact", "int8", "k8v4", "int4"):
            cache = dual_cache(model, kv=kv)
            model(ids, past_key_values=cache)
            sizes.append(cache.retained_bytes)
        assert sizes == sorted(sizes, reverse=True)
        for asked in ("int3", 4, None):
            with pytest.raises(UserError, match=r"kv=.*choose one of exact, int8, k8v4, int4"):
                DualCache([], mask, model.config, kv=asked)
    with pytest.raises(UserError, match="kv='bf16': choose one of"), duo_attention(model, mask, kv="bf16"):
        pass
    for few in (["int4"] * 3, ("int4",) * 5):
        message = f"kv has {len(few)} formats for 4 layers: give one for each"
        with pytest.raises(UserError, match=message), duo_attention(model, mask, kv=few):
            pass
    with pytest.raises(UserError, match="kv='int3': choose one of"), duo_attention(model, mask, kv=["int3"] * 4):
        pass
    assert not hasattr(model, "duo_id_deployment")


def test_heads_of_an_odd_width_are_refused() -> None:
    model = build("gpt2", hidden_size=27, num_attention_heads=3)
    with duo_attention(model, mask_for(model), kv="int4"):
        with pytest.raises(UserError, match=r"heads of .* are 9 wide, an odd number: use kv=exact"):
            dual_cache(model)
        dual_cache(model, kv="exact")


def test_first_tokens_of_unequal_lengths() -> None:
    """Stored at once, and the same as one by one."""
    model, (ids, real, positions) = model_of("llama"), padded_ids()
    options = {"attention_mask": real[:, :PROMPT], "position_ids": positions[:, :PROMPT]}
    with duo_attention(model, mask_for(model), kv="int4"):
        cache = dual_cache(model)
        model(ids[:, :PROMPT], past_key_values=cache, **options)
        for sample, length in enumerate(LENGTHS):
            alone = dual_cache(model)
            model(ids[sample : sample + 1, PROMPT - length : PROMPT], past_key_values=alone)
            for together, single in zip(cache.dual_layers, alone.dual_layers, strict=True):
                for name in ("key_codes", "value_codes", "key_scales", "value_scales"):
                    found, wanted = (getattr(x.full, name) for x in (together, single))
                    groups = length // GROUP
                    same = (x[:, :, :groups].double() for x in (found[sample : sample + 1], wanted))
                    torch.testing.assert_close(*same, atol=1e-9, rtol=0)
