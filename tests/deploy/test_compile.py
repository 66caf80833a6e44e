"""A decode step with a static cache is one graph, compiled once."""

from collections.abc import Iterator

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor

from duo_id import Eviction, dual_cache, duo_attention, prefill
from duo_id.deploy.eviction import evict
from tests.deploy.cases import PROMPT, TOKENS, build, case, check_equal, mask_for, padded_ids, random_ids, short_groups
from tests.deploy.reference import brute_force
from tests.deploy.test_eviction import hidden, hows, random_scores


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("family", "kind", "backend"),
    [
        ("llama", "mixed", "aot_eager"),
        ("gemma3_text", "mixed", "eager"),
        ("gpt_neox", "none", "eager"),
        ("gpt_neox", "spans", "eager"),
        pytest.param("llama", "mixed", "inductor", marks=pytest.mark.slow),  # compiles C++
    ],
)
@torch.no_grad()
def test_a_decode_step_is_one_graph(family: str, kind: str, backend: str) -> None:
    """What brute force computes: for unequal samples, over many steps, after a crop, a reorder and a reset, and with a
    new cache."""
    given = case(family, kind)
    ids, real, positions = padded_ids()
    counter = torch._dynamo.testing.CompileCounterWithBackend(backend)
    with duo_attention(given.model, given.mask):
        compiled = torch.compile(given.model.forward, fullgraph=True, dynamic=False, backend=counter)
        cache = dual_cache(given.model, 100)

        def decode(token: int, order: Tensor | None = None) -> None:
            order = torch.arange(3) if order is None else order
            new, at = (x[order, token : token + 1].contiguous() for x in (ids, positions))
            check_equal(compiled(new, past_key_values=cache, position_ids=at).logits,
                        given.padded_logits[order, token : token + 1])  # fmt: skip

        def prompt_and_steps() -> None:
            prompt = {"attention_mask": real[:, :PROMPT], "position_ids": positions[:, :PROMPT]}
            given.model(ids[:, :PROMPT], past_key_values=cache, **prompt)
            for token in range(PROMPT, PROMPT + 8):
                decode(token)

        prompt_and_steps()
        with torch._dynamo.config.patch(error_on_recompile=True):
            cache.crop(-1)
            decode(PROMPT + 7)
            cache.reorder_cache(torch.tensor([1, 2, 0]))
            decode(PROMPT + 8, torch.tensor([1, 2, 0]))
            cache.reset()
            prompt_and_steps()
            cache = dual_cache(given.model, 100)  # as `generate` makes for each call
            prompt_and_steps()
    assert counter.frame_count == 1


@pytest.mark.parametrize(("kv", "backend"), [("int8", "eager"), ("int4", "aot_eager")])
@torch.no_grad()
def test_a_decode_step_over_codes_is_one_graph(kv: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the plain step computes, while a group ends."""
    short_groups(monkeypatch)
    model, ids = build("llama", num_hidden_layers=2).double(), random_ids(2, 54)
    counter = torch._dynamo.testing.CompileCounterWithBackend(backend)
    with duo_attention(model, mask_for(model), kv=kv):
        compiled = torch.compile(model.forward, fullgraph=True, dynamic=False, backend=counter)
        caches = [dual_cache(model, 100) for _ in range(2)]
        for cache in caches:
            model(ids[:, :40], past_key_values=cache)
        for token in range(40, 54):
            new, at = ids[:, token : token + 1].contiguous(), torch.full((2, 1), token)
            found, wanted = (
                step(new, past_key_values=cache, position_ids=at).logits
                for step, cache in zip((compiled, model), caches, strict=True)
            )
            check_equal(found, wanted)
        for found, wanted in zip(*(cache.dual_layers for cache in caches), strict=True):
            assert torch.equal(found.full.key_codes, wanted.full.key_codes)
            assert found.full.key_codes[:, :, 2].any() or not len(found.full.heads)
    assert counter.frame_count == 1


@hows
@torch.no_grad()
def test_a_decode_step_after_eviction_is_one_graph(how: Eviction) -> None:
    """What brute force computes."""
    model, ids = build("llama"), random_ids(2, TOKENS)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    mask, found = mask_for(model), []
    with duo_attention(model, mask):
        compiled = torch.compile(model.forward, fullgraph=True, dynamic=False, backend=counter)
        cache = dual_cache(model, 100)
        prefill(model, ids[:, :PROMPT], cache)
        scores = random_scores(cache)
        gone = hidden(cache, scores, how)
        evict(cache, scores, how)
        for token in range(PROMPT, TOKENS):
            new, at = ids[:, token : token + 1].contiguous(), torch.full((2, 1), token)
            found.append(compiled(new, past_key_values=cache, position_ids=at).logits)
    assert counter.frame_count == 1
    with brute_force(model, mask, evicted=gone):
        check_equal(torch.cat(found, 1), model(ids, use_cache=False).logits[:, PROMPT:])
