"""Blocks, preemption, shared prefixes, parallel samples: what vLLM does with many requests, under a mask."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

import duo_id
from tests.vllm.engine.cases import (
    BLOCK,
    RECENT,
    SINK,
    alternating,
    answers,
    load,
    save_tiny,
    says,
    scheduler,
    served,
    some_prompts,
    tokens,
)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("llama", tmp_path_factory.mktemp("tiny"))


def managers(engine: Any) -> list[Any]:
    """What holds the blocks of each cache group."""
    return list(scheduler(engine).kv_cache_manager.coordinator.single_type_managers)


def streams(manager: Any) -> bool:
    return hasattr(manager.kv_cache_spec, "sink_size")


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> dict[bool, Counter]:
    """The most blocks that one request held at once, by whether its heads stream and by its tokens then."""
    spec = pytest.importorskip("duo_id.vllm.spec")
    base = spec.SlidingWindowManager.__mro__[1]
    most: dict[bool, Counter] = {True: Counter(), False: Counter()}
    allocate = base.allocate_new_blocks

    def watched(self: Any, request_id: str, num_tokens: int, *args: Any) -> Any:
        new = allocate(self, request_id, num_tokens, *args)
        count = sum(not block.is_null for block in self.req_to_blocks[request_id])
        most[streams(self)][num_tokens] = max(count, most[streams(self)][num_tokens])
        return new

    monkeypatch.setattr(base, "allocate_new_blocks", watched)
    return most


@pytest.mark.parametrize(("sink", "recent"), [(32, 64), (33, 65), (0, 1), (5, 100)], ids=str)
def test_a_request_holds_the_blocks_of_sink_and_window(
    sink: int, recent: int, tiny: Path, held: dict[bool, Counter]
) -> None:
    """Whatever the length: docs/serving.md has the formula."""
    mask, chunk, prompt = alternating(sink=sink, recent=recent), 128, some_prompts(1000)
    with served(tiny, mask, max_num_batched_tokens=chunk, async_scheduling=False) as engine:
        assert tokens(says(engine, prompt, new=80)) == answers(load(tiny), mask, prompt, new=80)
        (cap,) = {manager.max_admission_blocks_per_request for manager in managers(engine) if streams(manager)}
    assert all(held[False][length] == -(-length // BLOCK) for length in held[False])
    sink_blocks = -(-sink // BLOCK)
    decoding = {length: count for length, count in held[True].items() if length > 1000}
    assert len(decoding) == 79
    for length, count in decoding.items():  # of the query at length - 1
        first = max(sink_blocks, (length - recent) // BLOCK)
        assert count == sink_blocks + -(-length // BLOCK) - first
    assert max(held[True].values()) <= cap <= sink_blocks + -(-(recent - 1 + chunk) // BLOCK) + 1


def test_all_blocks_return_to_the_pool(tiny: Path) -> None:
    with served(tiny, alternating()) as engine:
        pool = scheduler(engine).kv_cache_manager.block_pool
        free = pool.get_num_free_blocks()
        says(engine, some_prompts(700, 40, 200))
        assert pool.get_num_free_blocks() == free


@pytest.mark.parametrize("caching", [True, False], ids=["shared", "alone"])
def test_preempted_requests_say_the_same(caching: bool, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = some_prompts(*range(100, 180, 10))
    with served(
        tiny, alternating(), max_model_len=512, num_gpu_blocks_override=60, enable_prefix_caching=caching
    ) as engine:
        preempted = count_calls(monkeypatch, type(scheduler(engine)), "_preempt_request")
        said = tokens(says(engine, prompts, new=150))
    assert preempted
    assert said == answers(load(tiny), alternating(), prompts, new=150)


def count_calls(monkeypatch: pytest.MonkeyPatch, owner: type, name: str) -> list[Any]:
    calls, original = [], getattr(owner, name)

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(owner, name, counted)
    return calls


@pytest.mark.parametrize(
    ("whole", "streaming", "size", "groups"), [(68, 22, 68, 2), (45, 45, 45, 2), (22, 68, 22, 5)], ids=str
)
def test_pages_of_retrieval_heads_are_never_empty(whole: int, streaming: int, size: int, groups: int) -> None:
    grouped = pytest.importorskip("duo_id.vllm.groups").grouped
    interface = pytest.importorskip("vllm.v1.kv_cache_interface")
    shape = {"block_size": BLOCK, "num_kv_heads": 1, "head_size": 32, "dtype": torch.float32}
    spec = pytest.importorskip("duo_id.vllm.spec").SinkWindowSpec(**shape, sliding_window=RECENT, sink_size=SINK)
    full = interface.FullAttentionSpec(**shape)
    specs = {f"layers.{i}.attn.kv0": full if i < whole else spec for i in range(whole + streaming)}
    found = grouped(specs)
    assert (max(len(group.layer_names) for group in found), len(found)) == (size, groups)
    assert sorted(name for group in found for name in group.layer_names) == sorted(specs)
    assert [len(group.layer_names) for group in found if group.kv_cache_spec == full] == [whole]
    few = {name: full if i < 2 else spec for i, name in enumerate(specs)}
    assert len(grouped(few)) <= 17
    assert grouped(dict.fromkeys(specs, spec)) is None


def test_a_mask_lets_more_requests_run_side_by_side(tiny: Path) -> None:
    """In the same memory: what admission reserves knows the sink and the window."""
    prompts, side_by_side = some_prompts(*[640] * 8), {}
    for name, heads in {"mask": duo_id.HeadSpans(torch.full((4, 4), RECENT), SINK), "none": None}.items():
        # A block of a mask is of one head of 16, and a block without one of all heads of a layer.
        options = {"max_model_len": 1024, "max_num_batched_tokens": 128, "async_scheduling": False}
        with served(tiny, heads, num_gpu_blocks_override=65, **options) as engine:
            running, step = [], scheduler(engine).schedule
            scheduler(engine).schedule = lambda *args, step=step, engine=engine, running=running: (
                step(*args),
                running.append(len(scheduler(engine).running)),
            )[0]
            assert tokens(says(engine, prompts, new=60)) == answers(load(tiny), heads, prompts, new=60)
            side_by_side[name] = max(running)
    assert side_by_side["none"] < 4
    assert side_by_side["mask"] == 8


class TestSharedPrefixes:
    """The second request takes the blocks of the first: of retrieval heads all, of streaming heads sink and window."""

    def test_a_prompt_again_and_one_that_goes_on(self, tiny: Path) -> None:
        prompt, *ends = some_prompts(900, 200, 210, 220)
        sequence = [prompt, prompt, prompt + ends[0], *(prompt[:500] + end for end in ends)]
        expected = answers(load(tiny), alternating(), sequence)
        with served(tiny, alternating()) as engine:
            outputs = [says(engine, [given])[0] for given in sequence]
        assert tokens(outputs) == expected
        cached = [output.num_cached_tokens for output in outputs]
        # vLLM remembers windows at the end of a prompt; elsewhere once a second prompt has branched off there.
        assert cached == [0, 896, 896, 32, 480, 480]

    def test_side_by_side(self, tiny: Path) -> None:
        prefix, *ends = some_prompts(600, 10, 50, 90)
        prompts = [prefix + end for end in ends]
        with served(tiny, alternating()) as engine:
            says(engine, [prefix])
            outputs = says(engine, prompts, new=40)
        assert tokens(outputs) == answers(load(tiny), alternating(), prompts, new=40)
        assert [output.num_cached_tokens for output in outputs] == [576] * 3

    def test_freed_blocks_that_others_took_are_not_used(self, tiny: Path) -> None:
        """In a small pool the blocks of an earlier position are gone, and the hit is shorter or none: never wrong."""
        first, second, more = some_prompts(700, 690, 100)
        prompts = [first, second, first[:330] + more, second[:450] + more, first, first + more]
        expected = answers(load(tiny), alternating(), prompts)
        with served(tiny, alternating(), max_model_len=1024, num_gpu_blocks_override=80) as engine:
            outputs = [says(engine, [prompt])[0] for prompt in prompts]
        assert tokens(outputs) == expected
        cached = [output.num_cached_tokens for output in outputs]
        assert any(cached)
        assert cached != [0, 0, 320, 448, 672, 672], "nothing was taken"

    def test_without_a_cache_of_prefixes(self, tiny: Path) -> None:
        prompts = some_prompts(300) * 3
        with served(tiny, alternating(), enable_prefix_caching=False) as engine:
            outputs = [says(engine, [prompt])[0] for prompt in prompts]
        assert tokens(outputs) == answers(load(tiny), alternating(), prompts)
        assert not any(output.num_cached_tokens for output in outputs)


def test_parallel_samples_are_those_of_single_requests(tiny: Path) -> None:
    """vLLM gives the samples of a request consecutive seeds; their probabilities are those of `duo_attention`."""
    (prompt,) = some_prompts(400)
    sampling = {"temperature": 1.0, "new": 24, "logprobs": 0}
    with served(tiny, alternating()) as engine:
        (together,) = says(engine, [prompt], n=4, seed=7, **sampling)
        alone = [says(engine, [prompt], seed=7 + index, **sampling)[0].outputs[0] for index in range(4)]
    samples = [list(sample.token_ids) for sample in together.outputs]
    assert samples == [list(sample.token_ids) for sample in alone]
    assert len({*map(tuple, samples)}) == 4
    model = load(tiny)
    for sample, said in zip(together.outputs, samples, strict=True):
        with torch.no_grad(), duo_id.duo_attention(model, alternating()):
            logits = model(torch.tensor([prompt + said]), use_cache=False).logits[0, len(prompt) - 1 : -1]
        given = torch.tensor([step[token].logprob for step, token in zip(sample.logprobs, said, strict=True)])
        torch.testing.assert_close(given, logits.log_softmax(-1)[range(24), said], rtol=1e-3, atol=1e-3)
