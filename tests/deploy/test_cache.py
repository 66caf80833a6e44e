"""What the dual cache holds, and what it does when it is grown, filled up, cropped, reordered and emptied."""

import random
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from duo_id import DualCache, HeadMask, dual_cache, duo_attention
from duo_id.common.errors import UserError
from duo_id.deploy.rings import StreamingStore
from duo_id.deploy.stores import FullStore
from duo_id.patterns.spans import ALL
from tests.deploy.cases import (
    LENGTHS,
    PROMPT,
    RECENT,
    SINK,
    TOKENS,
    WITH_LINEAR_ATTENTION,
    Case,
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
from tests.support.tiny import tiny_model

WINDOW = SINK + RECENT
SOME = ("llama", "gpt_neox", "gemma3_text")
KINDS = (None, 100)  # growing, static
MASKS = ("mixed", "spans")
kinds = pytest.mark.parametrize("max_length", KINDS)
masks = pytest.mark.parametrize("kind", MASKS)
families = pytest.mark.parametrize("family", SOME)


def snapshot(cache: DualCache) -> list[Any]:
    """All that the cache holds, copied: stores, lengths and counts."""
    tokens = cache.tokens
    stores = [x.clone() for layer in cache.dual_layers for store in layer.stores for x in (store.key, store.value)]
    counts = [int(tokens.seen), list(tokens.held), cache.get_seq_length()]
    return [*stores, tokens.lengths.clone(), *counts]


def check_unchanged(cache: DualCache, before: list[Any]) -> None:
    for now, then in zip(snapshot(cache), before, strict=True):
        assert torch.equal(now, then) if isinstance(now, Tensor) else now == then


def step(given: Case, cache: DualCache, ids: Tensor, real: Tensor | None = None) -> Tensor:
    """Logits of `ids`; `real` (batch, tokens so far) marks padding."""
    if real is None:
        return given.model(ids, past_key_values=cache).logits
    positions = (real.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
    return given.model(ids, past_key_values=cache, attention_mask=real, position_ids=positions).logits


def expected(given: Case, ids: Tensor, real: Tensor | None = None) -> Tensor:
    """The reference's logits of the whole sequence."""
    real = torch.ones_like(ids) if real is None else real
    positions = (real.cumsum(-1) - 1).clamp(min=0)
    with reference(given.model, given.mask):
        return given.model(ids, attention_mask=real, position_ids=positions, use_cache=False).logits


def check_goes_on(given: Case, cache: DualCache, past: Tensor, real: Tensor | None = None) -> None:
    """Check a token and a chunk, and both once more, after what the cache should hold: `past` (batch, tokens)."""
    parts = [random_ids(len(past), n, seed=9 + n) for n in (1, 4, 1, 6)]
    ids = torch.cat([past, *parts], 1)
    whole = None if real is None else torch.cat([real, torch.ones_like(ids[:, past.shape[1] :])], 1)
    wanted, end = expected(given, ids, whole), past.shape[1]
    for part in parts:
        start, end = end, end + part.shape[1]
        check_equal(step(given, cache, part, None if whole is None else whole[:, :end]), wanted[:, start:end])


def filled(given: Case, max_length: int | None, tokens: int, batch: int = 2) -> tuple[DualCache, Tensor]:
    cache, ids = dual_cache(given.model, max_length), random_ids(batch, tokens)
    step(given, cache, ids)
    return cache, ids


# Lengths and bytes


@pairwise(family=SOME, max_length=KINDS, kind=MASKS)
def test_lengths_are_those_of_the_tokens_that_went_in(kind: str, family: str, max_length: int | None) -> None:
    """The length of the sequence counts padding, as positions in transformers do; each sample's own does not."""
    given = case(family, kind)
    padded, real, _ = (x[1:] for x in padded_ids())
    with duo_attention(given.model, given.mask):
        cache = dual_cache(given.model, max_length)
        assert cache.get_seq_length() == 0
        assert not cache.is_initialized
        step(given, cache, padded[:, :PROMPT], real[:, :PROMPT])
        assert [int(cache.get_seq_length(layer)) for layer in range(4)] == [PROMPT] * 4
        assert cache.tokens.held == cache.tokens.lengths.tolist() == list(LENGTHS[1:])
        step(given, cache, padded[:, PROMPT : PROMPT + 1], real[:, : PROMPT + 1])
        assert cache.get_seq_length() == PROMPT + 1
        assert cache.tokens.held == cache.tokens.lengths.tolist() == [length + 1 for length in LENGTHS[1:]]
    assert cache.get_max_length() == (max_length or -1)
    assert cache.is_compileable == (max_length is not None)
    assert cache.get_mask_sizes(2, 0) == (max_length or PROMPT + 3, 0)
    assert {layer.batch_size for layer in cache.layers} == {2}


def formula(given: Case, batch: int, tokens: int, bytes_a_number: int = 4) -> int:
    """Bytes as the design says; a sliding layer's heads keep their window."""
    config, mask, slots = given.model.config, given.mask, 0
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    for layer, kind in enumerate(kinds):
        for head, full in enumerate(mask.retrieval[layer].tolist()):
            window = mask.sink_size + (mask.recent_size if isinstance(mask, HeadMask) else int(mask.spans[layer, head]))
            window = config.sliding_window if kind == "sliding_attention" else tokens if full else window
            slots += min(tokens, window)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * batch * head_dim * bytes_a_number * slots


def storage(cache: DualCache) -> int:
    """Bytes of memory behind all tensors of the cache's stores, whether views show all of it or not."""
    found = {}
    for layer in cache.dual_layers:
        for holder in (layer, *layer.stores):
            for tensor in vars(holder).values():
                if isinstance(tensor, Tensor):
                    memory = tensor.untyped_storage()
                    found[memory.data_ptr()] = memory.nbytes()
    return sum(found.values())


@families
@pytest.mark.parametrize("kind", ["mixed", "all", "none", "spans", "long"])
def test_bytes_of_a_static_cache_are_the_formula(family: str, kind: str) -> None:
    given = case(family, kind)
    with duo_attention(given.model, given.mask):
        for batch, max_length in ((1, 3000), (3, 500), (1, 20)):
            cache, _ = filled(given, max_length, 20, batch)
            assert cache.nbytes == formula(given, batch, max_length)
            assert storage(cache) < cache.nbytes + 2000, "beside the stores there are lists of heads alone"


@families
@pytest.mark.parametrize("kind", ["mixed", "all", "none", "spans", "long"])
def test_bytes_of_a_growing_cache_are_the_formula_within_a_hundredth(family: str, kind: str) -> None:
    given, tokens = case(family, kind), 20_000
    with duo_attention(given.model, given.mask):
        cache = dual_cache(given.model)
        assert cache.nbytes == 0
        cache.fill(1, tokens, torch.float32, "cpu")
        step(given, cache, random_ids(1, 1))
    wanted = formula(given, 1, tokens + 1)
    assert wanted <= cache.nbytes <= 1.01 * wanted
    assert storage(cache) < cache.nbytes + 2000


@families
@pytest.mark.parametrize("kind", ["mixed", "spans", "long"])
def test_windows_take_memory_as_they_fill(family: str, kind: str) -> None:
    """At any length a growing cache has the formula's bytes, and at most 64 tokens of slack in each head."""
    given = case(family, kind)
    with duo_attention(given.model, given.mask):
        cache = dual_cache(given.model)
        for tokens in (1, 2, 30, 63, 64, 150, 400, 460, 600):
            cache.fill(2, tokens, torch.float32, "cpu")
            wanted = formula(given, 2, tokens)
            assert wanted <= cache.nbytes <= formula(given, 2, tokens + 64)


def test_bytes_follow_the_type() -> None:
    model = build("llama").bfloat16()
    mask = mask_for(model)
    with duo_attention(model, mask):
        cache = dual_cache(model, 50)
        model(random_ids(2, 20), past_key_values=cache)
        assert cache.nbytes == formula(Case(model, mask, *[torch.empty(0)] * 3), 2, 50, 2)


def test_growth_token_by_token_copies_rarely_and_stays_within_a_hundredth() -> None:
    store = FullStore(torch.empty(1, 1, 0, 2), torch.tensor([0]), None, "sdpa")
    copies, copied, last = 0, 0, 0
    for tokens in range(1, 20_001):
        before = store.key
        store.reserve(tokens)
        assert store.key.shape[2] == store.value.shape[2] >= tokens
        if store.key is not before:
            assert tokens - last >= 64 or not last
            copies, copied, last = copies + 1, copied + before.shape[2], tokens
        if tokens > 8192:
            assert store.key.shape[2] <= 1.01 * tokens
    assert copies <= 20_000 / 64
    assert copied <= 128 * 20_000


def test_growth_keeps_what_is_there() -> None:
    store = FullStore(torch.empty(2, 3, 0, 4), torch.tensor([2, 0]), None, "sdpa")
    store.reserve(10)
    store.key.normal_()
    store.value.normal_()
    key, value = store.key.clone(), store.value.clone()
    store.reserve(1000)
    assert torch.equal(store.key[:, :, : key.shape[2]], key)
    assert torch.equal(store.value[:, :, : key.shape[2]], value)
    assert store.key[:, :, key.shape[2] :].eq(0).all(), "free slots are masked, which only numbers survive"


def test_growth_keeps_rings_and_what_is_complete_stays() -> None:
    """Heads of several spans, some of one, out of order; each grows to its window and no further."""
    spans = [ALL, 30, 500, 4, 500, 200]
    store = StreamingStore(torch.empty(2, 6, 0, 4), spans, 3, None, "auto")
    assert (list(store.heads), store.rows, store.nbytes) == ([2, 4, 5, 1, 3], 0, 0)
    for tokens in (1, 40, 190, 300, 502, 503, 10_000):
        before = [ring.view(store.key).clone() for ring in store.rings]
        store.reserve(tokens)
        for ring, old in zip(store.rings, before, strict=True):
            window = 3 + ring.window.recent_size
            assert min(tokens, window) <= ring.slots <= min(tokens + 64, window)
            view = ring.view(store.key)
            assert torch.equal(view[:, :, : old.shape[2]], old)
            assert view[:, :, old.shape[2] :].eq(0).all(), "free slots are masked, which only numbers survive"
        first = [ring.row + i * ring.slots for ring in store.rings for i in range(len(ring.heads))]
        assert store.listed.tolist() == [list(store.heads), first, [500, 500, 200, 30, 4]]
        store.key.normal_()
    assert store.slots == [503, 503, 203, 33, 7]


def test_most_steps_copy_nothing() -> None:
    given, moved = case("llama"), 0
    with duo_attention(given.model, given.mask):
        cache, _ = filled(given, None, 20)
        for _ in range(130):
            before = [
                x.data_ptr() for layer in cache.layers for store in layer.stores for x in (store.key, store.value)
            ]
            step(given, cache, random_ids(2, 1))
            after = [x.data_ptr() for layer in cache.layers for store in layer.stores for x in (store.key, store.value)]
            moved += before != after
    assert moved <= 2


@masks
@kinds
def test_fill_is_random_seeded_and_can_be_decoded_from(kind: str, max_length: int | None) -> None:
    given, ids = case("llama", kind), random_ids(2, 1)
    with duo_attention(given.model, given.mask):
        found = []
        for seed in (0, 0, 1):
            cache = dual_cache(given.model, max_length)
            cache.fill(2, 60, torch.float32, "cpu", seed)
            assert cache.get_seq_length() == 60
            assert cache.tokens.lengths.tolist() == [60, 60]
            stores = [store for layer in cache.layers for store in layer.stores if len(store.heads)]
            assert all(x.std() > 0.8 for store in stores for x in (store.key, store.value))
            found.append(step(given, cache, ids))
        again = dual_cache(given.model, max_length)
        step(given, again, random_ids(2, 20))
        again.fill(2, 60, torch.float32, "cpu", 0)
        found.append(step(given, again, ids))
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[3])
    assert not torch.equal(found[0], found[2])


def test_fill_beyond_a_static_cache_is_refused() -> None:
    given = case("llama")
    with duo_attention(given.model, given.mask), pytest.raises(UserError, match="max_length"):
        dual_cache(given.model, 50).fill(1, 51, torch.float32, "cpu")


# Reset


@pairwise(family=SOME, max_length=KINDS, kind=MASKS)
def test_reset_forgets_all(kind: str, family: str, max_length: int | None) -> None:
    given = case(family, kind)
    with duo_attention(given.model, given.mask):
        cache, _ = filled(given, max_length, 50)
        places = [store.key.data_ptr() for layer in cache.layers for store in layer.stores]
        cache.reset()
        assert cache.get_seq_length() == 0
        if max_length is None:
            assert cache.nbytes == 0
        else:
            assert places == [store.key.data_ptr() for layer in cache.layers for store in layer.stores]
        ids = random_ids(2, 30, seed=4)
        check_equal(step(given, cache, ids), expected(given, ids))
        check_goes_on(given, cache, ids)


def test_reset_of_a_growing_cache_takes_another_batch() -> None:
    given = case("llama")
    with duo_attention(given.model, given.mask):
        cache, _ = filled(given, None, 50)
        cache.reset()
        check_goes_on(given, cache, random_ids(3, 0))


@kinds
def test_reset_forgets_how_far_a_crop_may_go(max_length: int | None) -> None:
    given = case("llama")
    with duo_attention(given.model, given.mask):
        cache, _ = filled(given, max_length, 50)
        cache.crop(-1)
        cache.reset()
        ids = random_ids(2, WINDOW)
        step(given, cache, ids)
        cache.crop(-5)
        check_goes_on(given, cache, ids[:, :-5])


# Crop


@pairwise(count=[1, 5, 40], family=["llama", "gpt_neox"], max_length=KINDS)
def test_crop_where_all_heads_are_in_full(family: str, count: int, max_length: int | None) -> None:
    given = case(family, "all")
    with duo_attention(given.model, given.mask):
        cache, ids = filled(given, max_length, 50)
        cache.crop(-count)
        assert cache.get_seq_length() == 50 - count
        check_goes_on(given, cache, ids[:, :-count])


@pairwise(place=[(WINDOW, 4), (9, 9), (6, 5), (WINDOW + 1, 1), (50, 1)], family=SOME, max_length=KINDS)
def test_crop_within_the_window(family: str, place: tuple[int, int], max_length: int | None) -> None:
    given, (length, count) = case(family), place
    if family == "gemma3_text" and length == WINDOW:
        length = given.model.config.sliding_window
    with duo_attention(given.model, given.mask):
        cache, ids = filled(given, max_length, length)
        cache.crop(-count)
        assert cache.get_seq_length() == length - count
        check_goes_on(given, cache, ids[:, : length - count])


@pairwise(family=SOME, max_length=KINDS, kind=MASKS)
def test_crop_and_go_on_again_and_again(kind: str, family: str, max_length: int | None) -> None:
    """One token at a time can be taken back at any length, as long as one comes in between."""
    given = case(family, kind)
    with duo_attention(given.model, given.mask):
        cache, ids = filled(given, max_length, 5)
        for turn in range(20):
            extra = random_ids(2, 1 + turn % 3, seed=turn)
            step(given, cache, extra)
            cache.crop(-1)
            ids = torch.cat([ids, extra[:, :-1]], 1)
        check_goes_on(given, cache, ids)


@pairwise(place=[(WINDOW + 1, 2), (50, 2), (50, 50)], family=SOME, max_length=KINDS)
def test_crop_beyond_the_window_is_refused_and_changes_nothing(
    family: str, place: tuple[int, int], max_length: int | None
) -> None:
    given, (length, count) = case(family), place
    with duo_attention(given.model, given.mask):
        cache, ids = filled(given, max_length, length)
        before = snapshot(cache)
        with pytest.raises(UserError, match=rf"crop\(-{count}\): streaming heads keep only the last \d"):
            cache.crop(-count)
        check_unchanged(cache, before)
        check_goes_on(given, cache, ids)


@kinds
def test_tokens_that_were_overwritten_stay_lost_after_a_crop(max_length: int | None) -> None:
    """Crop 1, crop 1 is crop 2, also when the length then lies within the window, and for a reordered sample."""
    given = case("llama")
    with duo_attention(given.model, given.mask):
        cache, ids = filled(given, max_length, WINDOW + 1)
        cache.crop(-1)
        with pytest.raises(UserError, match="streaming heads"):
            cache.crop(-1)
        cache.reorder_cache(torch.tensor([1, 1]))
        with pytest.raises(UserError, match="streaming heads"):
            cache.crop(-1)
        check_goes_on(given, cache, ids[[1, 1], :-1])


@kinds
def test_crop_in_a_padded_batch_goes_by_the_real_tokens(max_length: int | None) -> None:
    given = case("llama")
    ids, real, _ = (x[:, PROMPT - 20 : PROMPT] for x in padded_ids())  # 20, 20 and 5 real tokens
    with duo_attention(given.model, given.mask):
        cache = dual_cache(given.model, max_length)
        step(given, cache, ids[2:], real[2:])
        with pytest.raises(UserError, match=r"crop\(-21\): a sample has only 20 tokens"):
            cache.crop(-21)
        cache.crop(-3)
        check_goes_on(given, cache, ids[2:, :-3], real[2:, :-3])
        cache = dual_cache(given.model, max_length)
        step(given, cache, ids, real)
        before = snapshot(cache)
        with pytest.raises(UserError, match="streaming heads"):
            cache.crop(-2)
        check_unchanged(cache, before)
        cache.crop(-1)
        assert cache.tokens.held == [19, 19, 4]
        check_goes_on(given, cache, ids[:, :-1], real[:, :-1])


@kinds
def test_crop_of_a_hybrid_minds_its_sliding_layers(max_length: int | None) -> None:
    given = case("gemma3_text", "all")
    window = given.model.config.sliding_window
    with duo_attention(given.model, given.mask):
        cache, ids = filled(given, max_length, window)
        cache.crop(-4)
        check_goes_on(given, cache, ids[:, :-4])
        cache, _ = filled(given, max_length, window + 1)
        with pytest.raises(UserError, match=f"last {window} of {window + 1} tokens"):
            cache.crop(-2)


@kinds
def test_crop_minds_the_smallest_span(max_length: int | None) -> None:
    """Of heads that see 2 to 500 tokens, those with the smallest lose tokens first; once they do, one can be taken."""
    given = case("llama", "spans")
    smallest = int(given.mask.spans[given.mask.spans > 0].min())
    with duo_attention(given.model, given.mask):
        cache, ids = filled(given, max_length, SINK + smallest)
        cache.crop(-3)
        check_goes_on(given, cache, ids[:, :-3])
        for length in (SINK + smallest + 1, 30, 70):
            cache, ids = filled(given, max_length, length)
            before = snapshot(cache)
            with pytest.raises(UserError, match=rf"crop\(-2\): .* only the last {smallest} of {length} tokens"):
                cache.crop(-2)
            check_unchanged(cache, before)
            cache.crop(-1)
            check_goes_on(given, cache, ids[:, :-1])


@kinds
def test_crops_that_mean_nothing(max_length: int | None) -> None:
    given = case("llama", "all")
    with duo_attention(given.model, given.mask):
        empty = dual_cache(given.model, max_length)
        empty.crop(-3)
        assert empty.get_seq_length() == 0
        cache, _ = filled(given, max_length, 20)
        before = snapshot(cache)
        cache.crop(0)
        with pytest.raises(UserError, match=r"crop\(7\): .*negative"):
            cache.crop(7)
        with pytest.raises(UserError, match=r"crop\(-21\): a sample has only 20 tokens"):
            cache.crop(-21)
        check_unchanged(cache, before)


@kinds
def test_crop_takes_columns_whatever_lies_in_them(max_length: int | None) -> None:
    """Padding after tokens, and in the middle, is taken back with the tokens beside it."""
    given, ids = case("llama", "all"), random_ids(2, 20)
    real = torch.ones_like(ids)
    real[0, 15:] = 0
    real[1, 12:17] = 0
    with duo_attention(given.model, given.mask):
        for count in (3, 7, 10):
            cache = dual_cache(given.model, max_length)
            step(given, cache, ids[:, :10], real[:, :10])
            step(given, cache, ids[:, 10:], real)
            cache.crop(-count)
            assert cache.tokens.held == real[:, :-count].sum(-1).tolist()
            check_goes_on(given, cache, ids[:, :-count], real[:, :-count])


# Assisted generation


@pairwise_of_some(["llama"], family=SOME, kind=["mixed", "spans", "all", "none"])
def test_prompt_lookup_writes_what_decoding_writes(family: str, kind: str) -> None:
    """Candidates are looked up in the prompt and mostly thrown away again, far beyond every window."""
    given, ids = case(family, kind), random_ids(1, 4).repeat(1, 9)
    options: dict[str, Any] = {"max_new_tokens": 16, "do_sample": False}
    with duo_attention(given.model, given.mask):
        wanted = given.model.generate(ids, **options)
        assert torch.equal(given.model.generate(ids, prompt_lookup_num_tokens=4, **options), wanted)


@pytest.mark.parametrize("masked", ["both", "draft", "main"])
def test_a_draft_model_changes_nothing(masked: str) -> None:
    given, draft, ids = case("llama"), tiny_model("llama", num_hidden_layers=2), random_ids(1, 30)
    options: dict[str, Any] = {"max_new_tokens": 16, "do_sample": False}
    with ExitStack() as stack:
        if masked != "draft":
            stack.enter_context(duo_attention(given.model, given.mask))
        if masked != "main":
            stack.enter_context(duo_attention(draft, mask_for(draft)))
        wanted = given.model.generate(ids, **options)
        assert torch.equal(given.model.generate(ids, assistant_model=draft, **options), wanted)


def test_an_early_exit_drafts_too() -> None:
    given, ids = case("llama"), random_ids(1, 30)
    options: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False}
    with duo_attention(given.model, given.mask):
        wanted = given.model.generate(ids, **options)
        assert torch.equal(given.model.generate(ids, assistant_early_exit=2, **options), wanted)
    assert given.model.config.num_hidden_layers == 4


@pairwise(family=SOME, chunk=[1, 3, 30], kind=MASKS)
def test_recorded_tokens_come_back_into_the_window(kind: str, family: str, chunk: int) -> None:
    """Again and again, in chunks below and above the window; beyond what is recorded it is refused."""
    given, cache_ids, draw = case(family, kind), random_ids(2, 20), random.Random(chunk)
    with duo_attention(given.model, given.mask):
        cache, ids = filled(given, None, 20)
        cache.activate_past_recording(6)
        assert cache.is_croppable
        ids = cache_ids
        for turn in range(8):
            extra = random_ids(2, chunk, seed=turn)
            step(given, cache, extra)
            ids = torch.cat([ids, extra], 1)
            count = min(draw.randrange(8), chunk)
            cache.crop(-count)
            ids = ids[:, : ids.shape[1] - count]
        twin = cache.fork(torch.tensor([1, 0]))
        check_goes_on(given, cache, ids)
        check_goes_on(given, twin, ids.flip(0))
        with pytest.raises(UserError, match="activate_past_recording"):
            cache.crop(-8)


def test_a_static_cache_records_nothing() -> None:
    given = case("llama")
    with duo_attention(given.model, given.mask), pytest.raises(UserError, match="static"):
        dual_cache(given.model, 50).activate_past_recording()


# Samples of the batch


@pairwise(order=[[2, 0, 0], [1, 2, 0], [2, 2, 2]], family=SOME, max_length=KINDS, kind=MASKS, chunk=[3, 1])
def test_reorder(kind: str, family: str, order: list[int], chunk: int, max_length: int | None) -> None:
    """Of unequal samples, in the middle of generation: after a chunk and after single tokens."""
    given = case(family, kind)
    ids, real, _ = (x[:, PROMPT - 30 : PROMPT + 3] for x in padded_ids())
    with duo_attention(given.model, given.mask):
        cache = dual_cache(given.model, max_length)
        step(given, cache, ids[:, :30], real[:, :30])
        for start in range(30, 33, chunk):
            step(given, cache, ids[:, start : start + chunk], real[:, : start + chunk])
        cache.reorder_cache(torch.tensor(order))
        assert cache.tokens.held == cache.tokens.lengths.tolist() == [[33, 33, 8][sample] for sample in order]
        check_goes_on(given, cache, ids[order], real[order])


@pairwise(family=SOME, max_length=KINDS, kind=MASKS)
def test_repeat_and_select(kind: str, family: str, max_length: int | None) -> None:
    given = case(family, kind)
    ids, real, _ = (x[:, PROMPT - 30 : PROMPT] for x in padded_ids())
    order = [0, 1, 2]

    def keep(indices: Tensor) -> None:
        cache.batch_select_indices(indices)
        assert all(len(layer.arrived) == len(order) * layer.layer.kv_heads for layer in cache.layers)
        assert {layer.batch_size for layer in cache.layers} == {len(order)}

    with duo_attention(given.model, given.mask):
        cache = dual_cache(given.model, max_length)
        step(given, cache, ids, real)
        cache.batch_repeat_interleave(2)
        order = [0, 0, 1, 1, 2, 2]
        assert all(len(layer.arrived) == len(order) * layer.layer.kv_heads for layer in cache.layers)
        check_goes_on(given, cache, ids[order], real[order])
        cache = dual_cache(given.model, max_length)
        step(given, cache, ids, real)
        order = [2, 0]
        keep(torch.tensor(order))
        check_goes_on(given, cache, ids[order], real[order])
        cache = dual_cache(given.model, max_length)
        step(given, cache, ids, real)
        order = [1, 2]
        keep(torch.tensor([False, True, True]))
        check_goes_on(given, cache, ids[order], real[order])


@kinds
def test_an_empty_cache_can_be_reordered(max_length: int | None) -> None:
    given = case("llama")
    with duo_attention(given.model, given.mask):
        cache = dual_cache(given.model, max_length)
        cache.reorder_cache(torch.tensor([0, 0]))
        cache.batch_repeat_interleave(3)
        cache.batch_select_indices(torch.tensor([0]))
        check_goes_on(given, cache, random_ids(2, 0))


@masks
def test_a_static_cache_stays_where_it_is(kind: str) -> None:
    """A compiled or captured step knows the addresses: of keys and values, and of the counts."""
    given = case("llama", kind)

    def places(cache: DualCache) -> list[int]:
        stores = [x.data_ptr() for layer in cache.layers for store in layer.stores for x in (store.key, store.value)]
        arrived = [layer.arrived.data_ptr() for layer in cache.layers]
        return [*stores, *arrived, cache.tokens.lengths.data_ptr(), cache.tokens.seen.data_ptr()]

    with duo_attention(given.model, given.mask):
        cache, _ = filled(given, 100, 50)
        before = places(cache)
        for change in (
            lambda: cache.reorder_cache(torch.tensor([1, 0])),
            lambda: step(given, cache, random_ids(2, 1)),
            lambda: step(given, cache, random_ids(2, 3)),
            lambda: cache.crop(-1),
            cache.reset,
            lambda: cache.fill(2, 30, torch.float32, "cpu"),
        ):
            change()
            assert places(cache) == before


@pytest.mark.parametrize(("kind", "max_length"), [("mixed", None), ("all", 100)], ids=["growing", "static"])
def test_layers_without_attention_keep_the_state_that_they_have(kind: str, max_length: int | None) -> None:
    """They are reordered and reset with the others. Their own two ways to compute, for chunks and for single tokens,
    differ by 1e-3, so the model itself is run in the same chunks where it can be."""
    model = tiny_model("qwen3_next", **WITH_LINEAR_ATTENTION)
    mask, ids = mask_for(model, kind=kind), random_ids(3, TOKENS)
    order = [2, 0, 0]
    with reference(model, mask):
        expected = model(ids, use_cache=False).logits
    own = DynamicCache(config=model.config)
    plain = [run(model, ids[:, :PROMPT], own, PROMPT)[order]]
    own.reorder_cache(torch.tensor(order))
    plain += [model(x, past_key_values=own).logits for x in ids[order, PROMPT:].split(1, 1)]
    with duo_attention(model, mask):
        cache = dual_cache(model, max_length)
        for _ in range(2):
            found = run(model, ids[:, :PROMPT], cache, PROMPT)
            check_equal(found, expected[:, :PROMPT])
            cache.reorder_cache(torch.tensor(order))
            steps = [model(x, past_key_values=cache).logits for x in ids[order, PROMPT:].split(1, 1)]
            assert (torch.cat(steps, 1) - expected[order, PROMPT:]).abs().max() < 5e-3
            if kind == "all":
                check_equal(torch.cat([found[order], *steps], 1), torch.cat(plain, 1))
            with pytest.raises(UserError, match="layers without attention"):
                cache.crop(-1)
            cache.reset()
            assert cache.get_seq_length() == 0


# Bad input


@pairwise(family=SOME, extra=[1, 2, 30], kind=MASKS)
def test_a_static_cache_that_is_full_refuses_before_it_writes(kind: str, family: str, extra: int) -> None:
    given = case(family, kind)
    with duo_attention(given.model, given.mask):
        cache, ids = filled(given, 55, 55 - extra // 2)
        before = snapshot(cache)
        with pytest.raises(UserError, match=r"holds 55 tokens but would need .*max_length"):
            step(given, cache, random_ids(2, extra))
        check_unchanged(cache, before)
        if extra > 1:  # what fits is still taken
            more = random_ids(2, extra // 2)
            check_equal(step(given, cache, more), expected(given, torch.cat([ids, more], 1))[:, -(extra // 2) :])


def test_a_prompt_too_long_for_a_static_cache() -> None:
    given, ids = case("llama"), random_ids(2, 30)
    with duo_attention(given.model, given.mask):
        cache = dual_cache(given.model, 29)
        with pytest.raises(UserError, match="holds 29 tokens but would need 30"):
            step(given, cache, ids)
        assert cache.get_seq_length() == 0
        check_equal(step(given, cache, ids[:, :29]), expected(given, ids)[:, :29])
        with pytest.raises(UserError, match="holds 29 tokens"):
            given.model.generate(ids, max_new_tokens=4, past_key_values=dual_cache(given.model, 29))


@masks
def test_padding_takes_no_room_in_a_static_cache(kind: str) -> None:
    given = case("llama", kind)
    ids, real, _ = padded_ids()
    with duo_attention(given.model, given.mask):
        cache = dual_cache(given.model, LENGTHS[2] + 2)
        for start, end in ((0, PROMPT), (PROMPT, PROMPT + 1), (PROMPT + 1, PROMPT + 2)):
            check_equal(
                step(given, cache, ids[2:, start:end], real[2:, :end])[real[2:, start:end] == 1],
                given.padded_logits[2:, start:end][real[2:, start:end] == 1],
            )
        with pytest.raises(UserError, match="holds 7 tokens but would need 8"):
            step(given, cache, ids[2:, -1:], real[2:, : PROMPT + 3])


@kinds
@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize("batch", [1, 3])
def test_another_batch_size_is_refused(batch: int, tokens: int, max_length: int | None) -> None:
    given = case("llama")
    with duo_attention(given.model, given.mask):
        cache, ids = filled(given, max_length, 20)
        before = snapshot(cache)
        with pytest.raises(UserError, match=f"holds 2 samples, but the batch has {batch}"):
            step(given, cache, random_ids(batch, tokens))
        check_unchanged(cache, before)
        check_goes_on(given, cache, ids)


def test_no_room_at_all_is_refused() -> None:
    given = case("llama")
    with duo_attention(given.model, given.mask), pytest.raises(UserError, match="max_length=0"):
        dual_cache(given.model, 0)


@masks
@families
def test_a_fork_goes_on_alone(kind: str, family: str) -> None:
    given, order = case(family, kind), torch.tensor([1, 0, 1])
    with duo_attention(given.model, given.mask):
        cache = dual_cache(given.model)
        step(given, cache, given.ids[:, :PROMPT])
        before = snapshot(cache)
        twin = cache.fork(order)
        found = step(given, twin, given.ids[order, PROMPT:])
        check_unchanged(cache, before)
        check_equal(found, given.logits[order, PROMPT:])
        again = cache.fork(torch.tensor([0, 1]))  # as many samples as there were
        step(given, again, given.ids[:, PROMPT:])
        check_unchanged(cache, before)
        check_equal(step(given, cache, given.ids[:, PROMPT:]), given.logits[:, PROMPT:])


def test_layers_without_attention_are_forked_too() -> None:
    model = tiny_model("qwen3_next", **WITH_LINEAR_ATTENTION)
    ids, order = random_ids(2, 40), torch.tensor([1, 0, 1])
    with duo_attention(model, mask_for(model)):
        wanted = model(ids).logits[:, 30:]
        cache = dual_cache(model)
        model(ids[:, :30], past_key_values=cache)
        check_equal(model(ids[order, 30:], past_key_values=cache.fork(order)).logits, wanted[order])
        check_equal(model(ids[:, 30:], past_key_values=cache).logits, wanted)


@pytest.mark.parametrize("kv", ["exact", "int4"])
@masks
@families
def test_a_fork_has_room_and_is_forked_again(family: str, kind: str, kv: str) -> None:
    """A growing cache becomes a static one, and that a growing one, between tokens that come one by one or several."""
    given, order, middle = case(family, kind), torch.tensor([1, 0, 1]), PROMPT + 6
    logits = given.logits if kv == "exact" else None
    with duo_attention(given.model, given.mask, kv=kv):
        cache = dual_cache(given.model)
        step(given, cache, given.ids[:, :PROMPT])
        static, grows = cache.fork(order, TOKENS), cache.fork(order)
        assert static.max_length == static.max_cache_len == TOKENS
        addresses = [tensor.data_ptr() for layer in static.dual_layers for tensor in layer.full.tensors.values()]
        found = [step(given, static, given.ids[order, place : place + 1]) for place in range(PROMPT, middle)]
        assert addresses == [x.data_ptr() for layer in static.dual_layers for x in layer.full.tensors.values()]
        again = static.fork(torch.tensor([2, 0]))
        assert again.max_length is None
        found.append(step(given, again, given.ids[[1, 1], middle:])[[0, 1, 0]])
        if logits is None:
            parts = [given.ids[order, place : place + 1] for place in range(PROMPT, middle)]
            wanted = [step(given, grows, part) for part in [*parts, given.ids[order, middle:]]]
            check_equal(torch.cat(found, 1)[[0, 2]], torch.cat(wanted, 1)[[0, 2]])
        else:
            check_equal(torch.cat(found, 1)[[0, 2]], logits[[1, 1], PROMPT:])
        with pytest.raises(UserError, match=f"holds {TOKENS} tokens but would need"):
            step(given, static, given.ids[order, middle - 1 :])


@pytest.mark.parametrize("max_length", [0, True, 31.5, "40", PROMPT - 1], ids=str)
def test_a_fork_without_room_is_refused(max_length: Any) -> None:
    given = case("llama")
    with duo_attention(given.model, given.mask):
        cache = dual_cache(given.model)
        step(given, cache, given.ids[:, :PROMPT])
        with pytest.raises(UserError, match=f"must be a number of tokens, at least {PROMPT}"):
            cache.fork(torch.tensor([0]), max_length)
        cache.fork(torch.tensor([0]), PROMPT)
        cache.activate_past_recording()
        with pytest.raises(UserError, match="fork: a static cache cannot keep tokens beyond its windows"):
            cache.fork(torch.tensor([0]), TOKENS)


@pytest.mark.parametrize("kv", ["exact", "int4"])
def test_tensors_of_a_static_fork_stay_where_they_are_for_the_compiler(kv: str) -> None:
    given = case("llama")
    with duo_attention(given.model, given.mask, kv=kv):
        cache = dual_cache(given.model)
        step(given, cache, given.ids[:, :PROMPT])
        fork = cache.fork(torch.tensor([0, 1]), TOKENS)
    pinned = [fork.tokens.lengths, fork.tokens.seen, *(layer.arrived for layer in fork.dual_layers)]
    stores = [store for layer in fork.dual_layers for store in layer.stores]
    pinned += [tensor for store in stores for tensor in store.tensors.values()]
    assert all(hasattr(tensor, "_dynamo_static_input_type") for tensor in pinned)


def test_a_static_cache_that_widened_heads_is_not_forked() -> None:
    given = case("llama")
    with duo_attention(given.model, given.mask):
        dual_cache(given.model, TOKENS).fork(torch.tensor([0]))
        with pytest.raises(UserError, match="max_length=8, so they are kept as retrieval heads are: make the cache"):
            dual_cache(given.model, 8).fork(torch.tensor([0]))


@pytest.mark.parametrize("kind", ["mixed", "spans", "long"])
@pytest.mark.parametrize("tokens", [1, WINDOW - 1, WINDOW, PROMPT])
@families
def test_retained_bytes_count_what_heads_keep(family: str, tokens: int, kind: str) -> None:
    given = case(family, kind)
    with duo_attention(given.model, given.mask):
        cache = dual_cache(given.model)
        assert cache.retained_bytes == 0
        step(given, cache, given.ids[:, :tokens])
        assert cache.retained_bytes == formula(given, 1, tokens)
