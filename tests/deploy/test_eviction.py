"""Retrieval heads that keep some tokens of a context answer as if the others were masked out, and free their memory."""

import copy
import functools
import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from duo_id import Eviction, HeadMask, HeadSpans, dual_cache, duo_attention, prefill
from duo_id.common.errors import UserError
from duo_id.deploy import eviction, token_scores
from duo_id.deploy.cache import DualCache
from duo_id.deploy.eviction import evict, heads_of
from duo_id.deploy.layer import DualLayer
from duo_id.deploy.token_scores import Scores, evictable
from tests.deploy.cases import HYBRID, PROMPT, SINK, TOKENS, build, check_equal, mask_for, random_ids
from tests.deploy.reference import Evicted, brute_force
from tests.support.tiny import tiny_model

HOW = Eviction(keep=0.4, score="snapkv", window=6, budget="uniform")  # 19 of 48 tokens
KEPT = 19
ADAPTIVE = replace(HOW, budget="adaptive")  # as many on average
hows = pytest.mark.parametrize("how", [HOW, ADAPTIVE], ids=["uniform", "adaptive"])


def random_scores(cache: DualCache, seed: int = 0) -> Scores:
    generator, scores = torch.Generator().manual_seed(seed), {}
    for layer in evictable(cache):
        stored = cache.tokens.held[0] - layer.full.dropped
        scores[layer.layer.index] = torch.randn(*layer.full.key.shape[:2], stored, generator=generator)
    return scores


def hidden(cache: DualCache, scores: Scores, how: Eviction = HOW) -> Evicted:
    """What the tokens of highest score, the sink and the latest leave out, found by sorting."""
    tokens, layers = cache.tokens.held[0], evictable(cache)
    batch, always = len(layers[0].full.key), {*range(SINK), *range(tokens - how.window, tokens)}
    found = {each.layer.index: torch.zeros(batch, each.layer.kv_heads, tokens, dtype=torch.bool) for each in layers}
    heads = [(each.layer.index, place, head) for each in layers for place, head in enumerate(each.full.heads)]
    groups = [heads] if how.budget == "adaptive" else [[head] for head in heads]  # that share a budget
    for sample, group in itertools.product(range(batch), groups):
        others = [(*head, token) for head in group for token in set(range(tokens)) - always]
        others.sort(key=lambda entry: -float(scores[entry[0]][sample, entry[1], entry[3]]))
        kept = int(how.keep * len(group) * tokens) - len(group) * len(always)
        for layer, _, head, token in others[kept:]:
            found[layer][sample, head, token] = True
    return Evicted(found)


def following(
    model: Any, ids: Tensor, cache: DualCache, steps: tuple[int, ...] = (4, 3), mask: Tensor | None = None
) -> Tensor:
    """The logits of all tokens after the prompt: some chunks, then token by token."""
    edges = [PROMPT, *itertools.accumulate(steps, initial=PROMPT)][1:]
    edges += range(edges[-1] + 1, ids.shape[1] + 1)
    parts = []
    for start, end in itertools.pairwise(edges):
        options = {}
        if mask is not None:
            positions = (mask[:, :end].cumsum(-1) - 1)[:, start:]
            options = {"attention_mask": mask[:, :end], "position_ids": positions}
        parts.append(model(ids[:, start:end], past_key_values=cache, **options).logits)
    return torch.cat(parts, 1)


CASES = [
    ("llama", "mixed", None), ("llama", "all", 60), ("llama", "spans", None), ("llama", "spans", 550),
    ("gemma2", "mixed", None), ("gpt_oss", "mixed", None), ("gpt2", "mixed", 60), ("granite", "mixed", None),
]  # fmt: skip


@pytest.mark.parametrize(("family", "kind", "max_length"), CASES, ids=str)
@pytest.mark.parametrize("steps", [(), (4, 3), (10,)], ids=str)
@hows
@torch.no_grad()
def test_evicted_tokens_are_as_if_masked(
    family: str, kind: str, max_length: int | None, steps: tuple[int, ...], how: Eviction
) -> None:
    model, ids = build(family), random_ids(2, TOKENS)
    mask = mask_for(model, kind=kind)
    with duo_attention(model, mask):
        cache = dual_cache(model, max_length)
        prefill(model, ids[:, :PROMPT], cache, 20)
        scores = random_scores(cache)
        gone = hidden(cache, scores, how)
        evict(cache, scores, how)
        if how is HOW:
            assert all(layer.full.dropped == PROMPT - KEPT for layer in evictable(cache))
        found = following(model, ids, cache, steps)
    with brute_force(model, mask, evicted=gone):
        check_equal(found, model(ids, use_cache=False).logits[:, PROMPT:])
    assert any(x.any() for x in gone.hidden.values())


@functools.cache
def llama() -> tuple[Any, HeadMask | HeadSpans]:
    model = build("llama")
    return model, mask_for(model)


@pytest.fixture
def deployed() -> Iterator[Any]:
    model, mask = llama()
    with duo_attention(model, mask), torch.no_grad():
        yield model


def evicted_cache(
    model: Any, ids: Tensor, max_length: int | None = None, how: Eviction = HOW
) -> tuple[DualCache, Evicted]:
    cache = dual_cache(model, max_length)
    prefill(model, ids[:, :PROMPT], cache)
    scores = random_scores(cache)
    gone = hidden(cache, scores, how)
    evict(cache, scores, how)
    return cache, gone


def expected(ids: Tensor, gone: Evicted, real: Tensor | None = None) -> Tensor:
    model, mask = llama()
    options = {} if real is None else {"attention_mask": real, "position_ids": (real.cumsum(-1) - 1).clamp(min=0)}
    with brute_force(model, mask, evicted=gone):
        return model(ids, use_cache=False, **options).logits[:, PROMPT:]


@hows
def test_questions_of_unequal_lengths_after_eviction(how: Eviction, deployed: Any) -> None:
    """Padded in front and in the middle, in chunks and in steps."""
    ids, real = random_ids(3, TOKENS), torch.ones(3, TOKENS, dtype=torch.long)
    real[0, PROMPT : PROMPT + 3] = real[1, PROMPT + 1] = real[2, PROMPT + 8] = 0
    cache, gone = evicted_cache(deployed, ids, how=how)
    found = following(deployed, ids, cache, (4, 3), real)
    shown = real[:, PROMPT:].bool()
    check_equal(found[shown], expected(ids, gone, real)[shown])


@hows
def test_copies_and_beams_after_eviction(how: Eviction, deployed: Any) -> None:
    ids = random_ids(2, TOKENS)
    cache, gone = evicted_cache(deployed, ids, how=how)
    order = torch.tensor([1, 0, 1])
    fork, static, saved = cache.fork(order), cache.fork(order, TOKENS), copy.deepcopy(cache)
    wanted = expected(ids, gone)
    check_equal(following(deployed, ids[order], fork), wanted[order])
    check_equal(following(deployed, ids[order], static), wanted[order])
    with pytest.raises(UserError, match=f"holds {TOKENS} tokens but would need {TOKENS + 1}"):
        deployed(ids[order, :1], past_key_values=static)
    check_equal(following(deployed, ids, saved), wanted)
    cache.offload()
    cache.prefetch()
    cache.batch_select_indices(order)
    check_equal(following(deployed, ids[order], cache), wanted[order])


@hows
@pytest.mark.parametrize("max_length", [None, 80], ids=["growing", "static"])
def test_generate_goes_on_from_an_evicted_cache(max_length: int | None, how: Eviction, deployed: Any) -> None:
    ids = random_ids(2, TOKENS)
    cache = dual_cache(deployed, max_length)
    prefill(deployed, ids[:, :PROMPT], cache, evict=how)
    saved = copy.deepcopy(cache)
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "attention_mask": torch.ones_like(ids)}
    found = deployed.generate(ids, past_key_values=cache, **options)[:, TOKENS:]
    token, wanted = ids[:, PROMPT:], []
    for _ in range(6):
        token = deployed(token, past_key_values=saved).logits[:, -1:].argmax(-1)
        wanted.append(token)
    assert torch.equal(found, torch.cat(wanted, 1))


@pytest.mark.parametrize("budget", ["uniform", "adaptive"])
def test_memory_is_freed(budget: str, deployed: Any) -> None:
    ids = random_ids(1, 3000)
    cache = dual_cache(deployed)
    prefill(deployed, ids, cache)
    before, kept_before = cache.nbytes, cache.retained_bytes
    evict(cache, random_scores(cache), Eviction(keep=0.25, budget=budget))
    rings = sum(layer.recent.nbytes for layer in cache.dual_layers)
    assert cache.retained_bytes - rings == (kept_before - rings) / 4
    assert cache.nbytes - rings <= 1.1 * (before - rings) / 4
    stored = sum(x.untyped_storage().nbytes() for each in cache.dual_layers for x in each.full.tensors.values())
    assert stored == cache.nbytes - rings, "no view keeps the rest alive"


@pytest.mark.parametrize("chunks", [True, False], ids=["chunks", "steps"])
def test_unequal_heads_grow(chunks: bool, deployed: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each time that there is no room, all heads move, and in no other step."""
    monkeypatch.setattr("duo_id.deploy.ragged.SLACK", 4)
    monkeypatch.setattr("duo_id.deploy.stores.SLACK", 4)
    ids = random_ids(2, PROMPT + 30)
    cache, gone = evicted_cache(deployed, ids, how=ADAPTIVE)
    wanted = expected(ids, gone)
    found, addresses = [], set[int]()
    for part in ids[:, PROMPT:].split(3 if chunks else 1, 1):
        found.append(deployed(part, past_key_values=cache).logits)
        addresses.add(evictable(cache)[0].full.key.data_ptr())
    check_equal(torch.cat(found, 1), wanted)
    assert len(addresses) <= 1 + 30 // 4
    for layer in evictable(cache):
        first, slots, dropped = layer.full.places.unbind(1)
        assert (slots + dropped).unique().tolist() == [PROMPT + layer.full.room]
        assert torch.equal(first, slots.cumsum(-1) - slots)
        assert layer.full.key.is_contiguous()


def test_bytes_of_unequal_heads(deployed: Any) -> None:
    """All samples keep as many tokens, to the token, and each later one takes a slot in every head."""
    ids = random_ids(3, PROMPT)
    cache, gone = evicted_cache(deployed, ids, how=replace(ADAPTIVE, keep=0.37))
    heads, entry = heads_of(evictable(cache)), 2 * 4 * deployed.config.head_dim
    rings = sum(layer.recent.retained_bytes(PROMPT) for layer in cache.dual_layers)
    kept = int(0.37 * heads * PROMPT)
    assert cache.retained_bytes - rings == kept * entry
    for sample in range(3):
        lost = sum(int(hidden[sample].sum()) for hidden in gone.hidden.values())
        assert heads * PROMPT - lost == kept
        assert cache.fork(torch.tensor([sample])).retained_bytes == cache.retained_bytes
    assert cache.bytes_of(PROMPT + 1) - cache.bytes_of(PROMPT) == heads * entry  # of rings, all are full
    assert len({int(layer.full.places[0, 2, 0]) for layer in evictable(cache)}) > 1, "unequal indeed"


def test_first_equally_many_and_then_not(deployed: Any) -> None:
    ids = random_ids(2, TOKENS)
    cache, gone = evicted_cache(deployed, ids)
    scores, how, of_tokens = random_scores(cache, seed=5), replace(ADAPTIVE, keep=0.3), {}
    for layer in evictable(cache):
        lost = layer.full.heads.select(gone.hidden[layer.layer.index])
        of_tokens[layer.layer.index] = torch.full(lost.shape, -torch.inf)
        of_tokens[layer.layer.index][~lost] = scores[layer.layer.index].flatten()
    gone = hidden(cache, of_tokens, how)
    evict(cache, scores, how)
    saved = copy.deepcopy(cache)
    check_equal(following(deployed, ids, cache), expected(ids, gone))
    with pytest.raises(
        UserError, match=r"^evict: heads of this cache keep unequally many tokens: evict once, or first "
    ):
        prefill(deployed, ids[:, :4], saved, evict=HOW)


@hows
def test_a_static_cache_has_as_much_room_as_before_and_starts_anew(how: Eviction, deployed: Any) -> None:
    ids = random_ids(1, TOKENS)
    cache, gone = evicted_cache(deployed, ids, TOKENS, how)
    if how is HOW:
        assert {layer.full.key.shape[2] for layer in evictable(cache)} == {TOKENS - PROMPT + KEPT}
    else:
        heads, slots = heads_of(evictable(cache)), sum(layer.full.key.shape[1] for layer in evictable(cache))
        assert slots == heads * (TOKENS - PROMPT) + int(0.4 * heads * PROMPT)
    check_equal(following(deployed, ids, cache), expected(ids, gone))
    with pytest.raises(UserError, match=f"holds {TOKENS} tokens but would need {TOKENS + 1}"):
        deployed(ids[:, :1], past_key_values=cache)
    cache.reset()
    check_equal(deployed(ids, past_key_values=cache).logits, deployed(ids, use_cache=False).logits)


@hows
def test_crop_goes_back_to_the_eviction(how: Eviction, deployed: Any) -> None:
    ids = random_ids(1, TOKENS)
    cache, gone = evicted_cache(deployed, ids, how=how)
    cache.activate_past_recording(TOKENS - PROMPT)
    wanted = expected(ids, gone)
    deployed(random_ids(1, 5, seed=4), past_key_values=cache)
    cache.crop(-5)
    with pytest.raises(UserError, match=f"tokens of the first {PROMPT} were evicted"):
        cache.crop(-1)
    check_equal(following(deployed, ids, cache), wanted)


def test_again_after_another_turn(deployed: Any) -> None:
    """Of those that stayed and those that came, no more than a share of the whole text."""
    ids = random_ids(1, TOKENS)
    cache = dual_cache(deployed)
    prefill(deployed, ids[:, :40], cache, evict=HOW)
    stored = [layer.full.dropped for layer in evictable(cache)]
    assert set(stored) == {40 - 16}
    prefill(deployed, ids[:, 40:], cache, 7, evict=HOW)
    assert {layer.full.dropped for layer in evictable(cache)} == {TOKENS - 23}
    assert cache.tokens.evicted == TOKENS


def seen_by_layers(monkeypatch: pytest.MonkeyPatch, model: Any, ids: Tensor) -> dict[int, tuple[Tensor, Tensor]]:
    """Queries and keys of all tokens, read in one forward."""
    found: dict[int, tuple[Tensor, Tensor]] = {}
    with monkeypatch.context() as patch:
        attend = DualLayer.attend

        def spy(self: DualLayer, query: Tensor, key: Tensor, *rest: Any, **options: Any) -> Tensor:
            found[self.layer.index] = query.double(), key.double()
            return attend(self, query, key, *rest, **options)

        patch.setattr(DualLayer, "attend", spy)
        model(ids, past_key_values=dual_cache(model))
    return found


def weights_of(query: Tensor, key: Tensor, head: int, rows: range) -> Tensor:
    """Attention weights (batch, group, rows, keys) of a KV head, by the definition."""
    group = query.shape[1] // key.shape[1]
    scores = query[:, head * group : (head + 1) * group, rows.start : rows.stop] @ key[:, head, None].mT
    scores = scores * query.shape[-1] ** -0.5
    later = torch.arange(key.shape[2]) > torch.arange(rows.start, rows.stop)[:, None]
    return scores.masked_fill(later, -torch.inf).softmax(-1)


def found_scores(monkeypatch: pytest.MonkeyPatch, model: Any, ids: Tensor, how: Eviction, chunk: int) -> Scores:
    """What `prefill` decides by."""
    given: Scores = {}
    with monkeypatch.context() as patch:
        patch.setattr(eviction, "evict", lambda cache, scores, how: given.update(scores))
        prefill(model, ids, dual_cache(model), chunk, evict=how)
    return given


@pytest.mark.parametrize("chunk", [PROMPT, 20, 47])
def test_snapkv_is_what_the_latest_queries_attend_to(
    chunk: int, deployed: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = random_ids(2, PROMPT)
    scores = found_scores(monkeypatch, deployed, ids, replace(HOW, pool=3), chunk)
    for index, (query, key) in seen_by_layers(monkeypatch, deployed, ids).items():
        for place, head in enumerate(torch.nonzero(llama()[1].retrieval[index])[:, 0].tolist()):
            weights = weights_of(query, key, head, range(PROMPT - 6, PROMPT)).sum((1, 2))
            near = [weights[:, max(0, t - 1) : t + 2].mean(-1) for t in range(PROMPT)]
            torch.testing.assert_close(scores[index][:, place].double(), torch.stack(near, -1), atol=1e-5, rtol=1e-5)


def test_keydiff_is_the_distance_from_the_mean_direction(deployed: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = random_ids(2, PROMPT)
    scores = found_scores(monkeypatch, deployed, ids, replace(HOW, score="keydiff"), 20)
    for index, (_, key) in seen_by_layers(monkeypatch, deployed, ids).items():
        for place, head in enumerate(torch.nonzero(llama()[1].retrieval[index])[:, 0].tolist()):
            unit = key[:, head] / key[:, head].norm(dim=-1, keepdim=True)
            mean = unit.mean(1, keepdim=True)
            wanted = -(unit * mean).sum(-1) / mean.norm(dim=-1)
            torch.testing.assert_close(scores[index][:, place].double(), wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("repeated", [100, 20])
def test_kvzip_is_the_largest_weight_while_the_context_is_repeated(
    repeated: int, deployed: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(token_scores, "REPEATED", repeated)
    ids = random_ids(2, PROMPT)
    scores = found_scores(monkeypatch, deployed, ids, replace(HOW, score="kvzip"), 20)
    wanted = {index: torch.zeros(x.shape, dtype=torch.float64) for index, x in scores.items()}
    for start in range(0, PROMPT, repeated):
        end = min(PROMPT, start + repeated)
        text = torch.cat([ids, ids[:, start:end]], 1)
        subset = torch.tensor([t for t in range(text.shape[1]) if t < SINK or start <= t < end or t >= PROMPT])
        context = len(subset) - (end - start)
        for index, (query, key) in seen_by_layers(monkeypatch, deployed, text).items():
            queries = torch.cat([query[:, :, :context], query[:, :, PROMPT:]], 2)
            for place, head in enumerate(torch.nonzero(llama()[1].retrieval[index])[:, 0].tolist()):
                weights = weights_of(queries, key[:, :, subset], head, range(context, len(subset))).amax((1, 2))
                found = wanted[index][:, place]
                found[:, subset[:context]] = torch.maximum(found[:, subset[:context]], weights[:, :context])
    for index, found in scores.items():
        torch.testing.assert_close(found.double(), wanted[index], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("score", ["snapkv", "keydiff", "kvzip"])
def test_prefill_with_eviction_returns_the_logits_of_the_whole_prompt(score: str, deployed: Any) -> None:
    """And whatever the score read, the cache goes on from the prompt's end."""
    ids = random_ids(2, TOKENS)
    cache, plain = dual_cache(deployed), dual_cache(deployed)
    logits = prefill(deployed, ids[:, :PROMPT], cache, 20, evict=replace(HOW, score=score))
    check_equal(logits, prefill(deployed, ids[:, :PROMPT], plain, 20))
    assert cache.get_seq_length() == PROMPT
    assert all(layer.observer is None for layer in cache.dual_layers)
    for each, other in zip(cache.dual_layers, plain.dual_layers, strict=True):
        assert each.full.dropped == (PROMPT - KEPT if len(each.full.heads) else 0)
        for name, tensor in each.recent.tensors.items():
            assert torch.equal(tensor, other.recent.tensors[name])


def test_a_share_that_keeps_everything_changes_nothing(deployed: Any) -> None:
    ids = random_ids(1, 20)
    cache = dual_cache(deployed)
    prefill(deployed, ids, cache, evict=Eviction(keep=0.1))  # sink and window take more
    assert all(layer.full.dropped == 0 for layer in cache.dual_layers)
    assert cache.tokens.evicted == 0


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"keep": 0}, r"^keep=0 must be a share"),
        ({"keep": 1.5}, r"^keep=1\.5 must be a share"),
        ({"score": "h2o"}, r"^score='h2o': choose one of snapkv, keydiff, kvzip$"),
        ({"window": 0}, r"^window=0 must be a whole number"),
        ({"pool": 4}, r"^pool=4 must be odd"),
        ({"budget": "layer"}, r"^budget='layer': choose one of uniform, adaptive$"),
        ({"budget": "adaptive", "score": "keydiff"}, r"^budget=adaptive: scores of keydiff do not compare"),
    ],
    ids=["nothing", "too much", "another score", "no window", "even", "another budget", "cosines"],
)
def test_impossible_settings(given: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Eviction(**({"keep": 0.5} | given))


def test_what_is_refused(deployed: Any) -> None:
    ids = random_ids(2, PROMPT)
    padded = torch.ones_like(ids)
    padded[1, :4] = 0
    for cache, options, message in (
        (dual_cache(deployed, kv="int8"), {"evict": HOW}, "use kv=exact"),
        (dual_cache(deployed), {"evict": HOW, "attention_mask": padded}, "padded batch"),
        (dual_cache(deployed), {"evict": 0.5}, "^evict=0.5 must be an Eviction"),
        (dual_cache(deployed, 60), {"evict": replace(HOW, score="kvzip")}, "leave max_length out"),
        (dual_cache(deployed, 20), {"evict": HOW}, "holds 20 tokens but would need 48"),
    ):
        with pytest.raises(UserError, match=message):
            prefill(deployed, ids, cache, **options)
    cache = dual_cache(deployed)
    prefill(deployed, ids, cache, attention_mask=padded)
    with pytest.raises(UserError, match="padded batch"):
        prefill(deployed, ids, cache, evict=HOW)
    cache = dual_cache(deployed)
    prefill(deployed, ids, cache)
    with pytest.raises(UserError, match="score=kvzip repeats the whole context, but the cache is not empty"):
        prefill(deployed, ids, cache, evict=replace(HOW, score="kvzip"))


@torch.no_grad()
def test_windows_as_large_as_a_static_cache_are_not_evicted() -> None:
    model = build("llama")
    with duo_attention(model, mask_for(model, kind="spans")):
        cache, ids = dual_cache(model, 60), random_ids(1, PROMPT)
        with pytest.raises(UserError, match="see all of max_length=60"):
            prefill(model, ids, cache, evict=HOW)


@torch.no_grad()
def test_layers_that_share_keys_need_a_score_without_queries() -> None:
    from tests.deploy.test_install import SHARED_KV

    model = tiny_model(
        "gemma3n_text", num_hidden_layers=4, num_kv_shared_layers=2, layer_types=HYBRID, sliding_window=9, head_dim=16,
        vocab_size_per_layer_input=96, hidden_size_per_layer_input=8, **SHARED_KV["gemma3n_text"],
    )  # fmt: skip
    ids = random_ids(1, PROMPT)
    with duo_attention(model, HeadSpans(torch.full((4, 2), -1), SINK, [1])):
        with pytest.raises(UserError, match=r"^score=snapkv: layers of this model share keys: use score=keydiff$"):
            prefill(model, ids, dual_cache(model), evict=HOW)
        cache = dual_cache(model)
        prefill(model, ids, cache, evict=replace(HOW, score="keydiff"))
        assert any(layer.full.dropped for layer in cache.dual_layers)
