"""Every contender computes what the plain model does, so that benchmarks measure only correct code."""

from functools import partial

import pytest
import torch
from transformers import AttentionInterface, DynamicCache, PreTrainedModel

from duo_id.benchmark import static_attention
from duo_id.benchmark.caches import decode_step
from duo_id.benchmark.contenders import CacheContender, DualAttention, StaticAttention
from duo_id.common.compat import cache_argument
from duo_id.deploy.cache import DualCache
from duo_id.deploy.prefill import read_in_chunks
from tests.benchmark.cases import MIXED, layers_of, mask, named
from tests.support.tiny import tiny_model

CONTEXT, BATCH = 30, 2
ALL = torch.ones_like(MIXED)
FULL = {
    "static": StaticAttention,
    "dual": partial(DualAttention, mask=mask(ALL)),
}


@pytest.fixture(params=["llama", "qwen3"])
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return tiny_model(request.param)


def contender(kind: str, model: PreTrainedModel, batch: int = BATCH) -> CacheContender:
    return FULL[kind](named(model), layers_of(model), batch)


def random_ids(tokens: int) -> torch.Tensor:
    return torch.randint(96, (BATCH, tokens), generator=torch.Generator().manual_seed(1))


def stored(chosen: CacheContender, cache: object) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The filled slots of each layer, all of whose heads are retrieval heads."""
    if isinstance(cache, DualCache):
        pairs = [(layer.full.key, layer.full.value) for layer in cache.dual_layers]
    else:
        pairs = [(layer.keys, layer.values) for layer in cache.layers]
    return [(key[:, :, :CONTEXT].clone(), value[:, :, :CONTEXT].clone()) for key, value in pairs]


@torch.no_grad()
@pytest.mark.parametrize("kind", FULL)
@pytest.mark.parametrize("spare", [1, 9])
def test_a_decode_step_equals_the_plain_model(model: PreTrainedModel, kind: str, spare: int) -> None:
    ids, chosen = random_ids(1), contender(kind, model)
    with chosen.installed():
        cache = chosen.new_cache(CONTEXT + spare)
        chosen.fill(cache, CONTEXT)
        past = stored(chosen, cache)
        assert chosen.choose_backend(cache, CONTEXT)
        logits = decode_step(chosen, model, cache, CONTEXT, ids)()
    plain = DynamicCache(config=model.config)
    for index, (key, value) in enumerate(past):
        assert key.std() > 0.5, "the cache holds random numbers"
        plain.update(key, value, index)
    positions = torch.full_like(ids, CONTEXT)
    expected = model(input_ids=ids, position_ids=positions, use_cache=True, **{cache_argument(model): plain}).logits
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("kind", FULL)
@pytest.mark.parametrize("chunk_size", [7, 40])
def test_a_prefill_equals_the_plain_model_also_in_a_used_cache(
    model: PreTrainedModel, kind: str, chunk_size: int
) -> None:
    ids, chosen = random_ids(CONTEXT), contender(kind, model)
    with chosen.installed():
        cache = chosen.new_cache(CONTEXT)
        for _ in range(2):
            chosen.clear(cache)
            logits = read_in_chunks(model, ids, cache, chunk_size)
    torch.testing.assert_close(logits, model(ids, use_cache=False).logits[:, -1], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_steps_go_on_where_the_host_counts_them() -> None:
    model = tiny_model("llama")
    ids, chosen = random_ids(CONTEXT), contender("static", model)
    with chosen.installed():
        cache = chosen.new_cache(CONTEXT)
        chosen.clear(cache)
        cache_arguments = {cache_argument(model): cache}
        parts = [model(ids[:, i : i + 1], use_cache=True, **cache_arguments).logits for i in range(CONTEXT)]
    torch.testing.assert_close(torch.cat(parts, 1), model(ids, use_cache=False).logits, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("kind", FULL)
def test_a_step_runs_as_often_as_there_are_slots(kind: str) -> None:
    model = tiny_model("llama")
    chosen = contender(kind, model)
    with chosen.installed():
        cache = chosen.new_cache(CONTEXT + 3)
        chosen.fill(cache, CONTEXT)
        step = decode_step(chosen, model, cache, CONTEXT, random_ids(1))
        for _ in range(3):
            assert step().isfinite().all()
        assert int(cache.get_seq_length()) == CONTEXT + 3
    if kind == "static":
        assert static_attention.host.tokens == CONTEXT + 1, "each step reads as much as the first"


def test_the_model_is_as_it_was_afterwards() -> None:
    model = tiny_model("llama")
    implementation = model.config._attn_implementation
    for kind in FULL:
        with contender(kind, model).installed():
            assert model.config._attn_implementation != implementation
        assert model.config._attn_implementation == implementation


def test_no_mask_is_made_for_the_baseline() -> None:
    model = tiny_model("llama")
    chosen, masks = contender("static", model), []
    with chosen.installed():
        ours = AttentionInterface()[static_attention.IMPLEMENTATION]

        def note(module, query, key, value, attention_mask, **options):
            masks.append(attention_mask)
            return ours(module, query, key, value, attention_mask, **options)

        AttentionInterface.register(static_attention.IMPLEMENTATION, note)
        cache = chosen.new_cache(CONTEXT)
        chosen.clear(cache)
        model(random_ids(4), use_cache=True, **{cache_argument(model): cache})
    assert masks == [None] * 3


def test_bytes_are_those_of_the_slots() -> None:
    model = tiny_model("llama")  # 3 layers of 2 KV heads of 16 float32
    static, dual = contender("static", model, 1), contender("dual", model, 1)
    duo = DualAttention(named(model), layers_of(model), 1, mask())
    for chosen, slots in ((static, 6 * 40), (dual, 6 * 40), (duo, 3 * 40 + 3 * 12)):
        with chosen.installed():
            cache = chosen.new_cache(40)
            chosen.fill(cache, 30)
            assert chosen.nbytes(cache) == 2 * 4 * 16 * slots
    assert (static.sparsity, dual.sparsity, duo.sparsity) == (0.0, 0.0, 0.5)


def test_the_baseline_compiles_once_for_all_contexts() -> None:
    model = tiny_model("llama")
    chosen, graphs = contender("static", model), []

    def backend(graph: torch.fx.GraphModule, inputs: object) -> object:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    with chosen.installed(), torch.no_grad():
        cache = chosen.new_cache(CONTEXT + 2)
        forward = torch.compile(model, dynamic=False, backend=backend)
        for context in (CONTEXT, 11, 5):
            chosen.fill(cache, context)
            past = [[x[:, :, :context].clone() for x in (layer.keys, layer.values)] for layer in cache.layers]
            logits = decode_step(chosen, forward, cache, context, random_ids(1))()
            second_cache = chosen.new_cache(context + 1)
            for layer, (key, value) in zip(second_cache.layers, past, strict=True):
                layer.keys[:, :, :context], layer.values[:, :, :context] = key, value
                layer.cumulative_length.fill_(context)
            expected = decode_step(chosen, model, second_cache, context, random_ids(1))()
            torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    torch._dynamo.reset()
    assert len(graphs) == 1
