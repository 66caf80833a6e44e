"""Whole models under a head mask on a GPU, where other kernels run, the compiler sets in and steps are captured.

Each test runs on the CPU too, with the same tokens: what is captured or compiled there is a plain step. Of what
`test_exact.py` has there anyway, one case does.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch._dynamo.utils
from torch import Tensor
from transformers import PreTrainedModel

from duo_id import Eviction, dual_cache, duo_attention, prefill
from duo_id.deploy.eviction import evict
from duo_id.patterns.spans import ALL, HeadSpans
from tests.deploy.cases import LENGTHS, PROMPT, TOKENS, build, case, mask_for, padded_ids, random_ids, reference, run
from tests.deploy.reference import brute_force
from tests.deploy.test_eviction import hidden, hows, random_scores
from tests.support.pairs import covering

FAMILIES = ("llama", "gpt_neox", "gemma3_text")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def model(device: str) -> Iterator[PreTrainedModel]:
    """The model of `case("llama")`, on the device while the test runs."""
    yield build("llama").to(device)
    torch._dynamo.reset()


def check_close(found: Tensor, expected: Tensor) -> None:
    """Against logits from the CPU: sums run in another order."""
    assert found.shape == expected.shape
    error = (found.cpu().float() - expected).abs().max() / expected.abs().max().clamp(min=1)
    assert error <= 5e-5, f"error {error:.1e}"


@contextmanager
def no_waiting(device: str) -> Iterator[None]:
    """A block in which nothing may wait for the GPU."""
    if device == "cpu":
        yield
        return
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def capture(step: Callable[[], Tensor], device: str) -> Callable[[], Tensor]:
    """The step as one CUDA graph, warmed up once; on the CPU it runs as it is."""
    stream = torch.cuda.Stream() if device == "cuda" else None
    if stream is not None:
        stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    if stream is None:
        return step
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()

    def replay() -> Tensor:
        graph.replay()
        return out

    return replay


def pairwise_on_a_gpu(**axes: Iterable[Any]) -> pytest.MarkDecorator:
    """As `pairwise`, and the first case on the CPU too."""
    first, *others = covering([list(axis) for axis in axes.values()])
    cases = [pytest.param(*row, "cuda", marks=pytest.mark.gpu) for row in (first, *others)]
    return pytest.mark.parametrize((*axes, "device"), [(*first, "cpu"), *cases])


@pairwise_on_a_gpu(family=FAMILIES, chunk=[7, 1, 40, PROMPT], max_length=[None, TOKENS], kind=["mixed", "spans"])
def test_chunks_and_steps(family: str, chunk: int, max_length: int | None, kind: str, device: str) -> None:
    given, model = case(family, kind), build(family).to(device)
    padded, real, positions = (x.to(device) for x in padded_ids())
    with duo_attention(model, given.mask):
        check_close(run(model, given.ids.to(device), dual_cache(model, max_length), chunk), given.logits)
        check_close(model(given.ids.to(device), use_cache=False).logits, given.logits)
        found = run(model, padded, dual_cache(model, max_length), chunk, real)
        check_close(found[real == 1], given.padded_logits[real.cpu() == 1])
        found = model(padded, attention_mask=real, position_ids=positions, use_cache=False).logits
        check_close(found[real == 1], given.padded_logits[real.cpu() == 1])


@pairwise_on_a_gpu(dtype=[torch.float32, torch.bfloat16], kind=["spans", "mask"])
def test_a_longer_prompt_in_chunks(dtype: torch.dtype, kind: str, device: str) -> None:
    model, ids = build("llama", max_position_embeddings=1024).to(dtype), random_ids(1, 800)
    mask = mask_for(model, 64, 256)
    if kind == "spans":
        mask = HeadSpans(torch.tensor([[ALL, 500], [64, 256], [1, 600], [5000, 300]]), 64)
    with reference(model, mask):
        expected = model(ids, use_cache=False).logits[:, -1].float()
    model.to(device)
    with duo_attention(model, mask):
        for chunk in (800, 300, 100):
            found = prefill(model, ids.to(device), dual_cache(model), chunk).cpu().float()
            error = (found - expected).norm() / expected.norm()
            assert error <= (5e-5 if dtype == torch.float32 else 5e-2), f"error {error:.1e}"


@pytest.mark.parametrize("kind", ["mixed", "spans"])
def test_a_decode_step_without_a_mask_does_not_wait_for_the_device(
    model: PreTrainedModel, kind: str, device: str
) -> None:
    """One with a mask waits once, to see whether the past in it is that of the cache."""
    mask, ids = mask_for(model, kind=kind), random_ids(2, TOKENS).to(device)
    padded, real, positions = (x.to(device) for x in padded_ids())
    with duo_attention(model, mask), torch.no_grad():
        cache, other = dual_cache(model), dual_cache(model)
        model(ids[:, :PROMPT], past_key_values=cache)
        model(padded[:, :PROMPT], past_key_values=other, attention_mask=real[:, :PROMPT])
        model(ids[:, PROMPT : PROMPT + 1], past_key_values=cache)  # compiles the kernel
        with no_waiting(device):
            for token in range(PROMPT + 1, TOKENS):
                model(ids[:, token : token + 1], past_key_values=cache)
            for token in range(PROMPT, TOKENS):
                part = slice(token, token + 1)
                model(padded[:, part], past_key_values=other, position_ids=positions[:, part])
    assert cache.tokens.lengths.tolist() == [TOKENS, TOKENS]
    assert other.tokens.lengths.tolist() == [length + TOKENS - PROMPT for length in LENGTHS]


@pairwise_on_a_gpu(family=["llama", "gemma3_text"], kind=["mixed", "none", "spans"])
def test_static_generation_is_compiled_and_writes_the_same(family: str, kind: str, device: str) -> None:
    given, model = case(family, kind), build(family).to(device)
    ids, real, _ = (x[:, :PROMPT].to(device) for x in padded_ids())
    options = {"attention_mask": real, "max_new_tokens": 14, "do_sample": False}
    with reference(given.model, given.mask):
        expected = given.model.generate(ids.cpu(), **options | {"attention_mask": real.cpu()}, use_cache=False)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with duo_attention(model, given.mask):
        assert model.generate(ids, **options).tolist() == expected.tolist()
        graphs = []
        for _ in range(2):  # the second time from compiled code alone
            assert model.generate(ids, cache_implementation="static", **options).tolist() == expected.tolist()
            graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
        assert graphs[0] == graphs[1]
        assert (graphs[0] > 0) == (device == "cuda")  # transformers compiles on accelerators alone
    assert "_compiled_call" not in vars(model)
    torch._dynamo.reset()


@pytest.mark.parametrize("kind", ["mixed", "spans"])
def test_replay_of_a_captured_decode_step(model: PreTrainedModel, kind: str, device: str) -> None:
    """A whole step in one CUDA graph: replayed, it goes on from where the cache is, also after a reorder."""
    given, ids, middle = case("llama", kind), case("llama").ids.to(device), (PROMPT + TOKENS) // 2
    with duo_attention(model, given.mask), torch.no_grad():
        cache = dual_cache(model, 100)
        new, at = ids[:, :1].clone(), torch.zeros(2, 1, dtype=torch.long, device=device)
        model(ids[:, :PROMPT], past_key_values=cache)
        step = capture(lambda: model(new, past_key_values=cache, position_ids=at).logits, device)

        def replay(token: int, order: list[int]) -> None:
            new.copy_(ids[order, token : token + 1])
            at.fill_(token)
            check_close(step(), given.logits[order, token : token + 1])

        cache.reset()
        model(ids[:, :PROMPT], past_key_values=cache)
        for token in range(PROMPT, middle):
            replay(token, [0, 1])
        cache.reorder_cache(torch.tensor([1, 0], device=device))
        for token in range(middle, TOKENS):
            replay(token, [1, 0])
        assert cache.get_seq_length() == TOKENS


@hows
@pytest.mark.parametrize("kind", ["mixed", "all"])
def test_replay_of_a_decode_step_captured_after_eviction(
    model: PreTrainedModel, kind: str, how: Eviction, device: str
) -> None:
    given, ids = case("llama", kind), case("llama").ids.to(device)
    with duo_attention(model, given.mask), torch.no_grad():
        cache = dual_cache(model, 100)
        prefill(model, ids[:, :PROMPT], cache)
        scores = random_scores(cache)
        gone = hidden(cache, scores, how)
        evict(cache, {index: score.to(device) for index, score in scores.items()}, how)
        new, at = ids[:, PROMPT : PROMPT + 1].clone(), torch.full((2, 1), PROMPT, device=device)
        step = capture(lambda: model(new, past_key_values=cache, position_ids=at).logits, device)
        cache.crop(-1)
        found = []
        for token in range(PROMPT, TOKENS):
            new.copy_(ids[:, token : token + 1])
            at.fill_(token)
            found.append(step().clone())
        assert cache.get_seq_length() == TOKENS
    model.cpu()
    with brute_force(model, given.mask, evicted=gone):
        check_close(torch.cat(found, 1), model(ids.cpu(), use_cache=False).logits[:, PROMPT:])


@pytest.mark.parametrize("kind", ["mixed", "all", "none", "spans", "long"])
def test_a_mask_of_any_kind(kind: str, device: str) -> None:
    given, model = case("llama", kind), build("llama").to(device)
    with duo_attention(model, given.mask):
        check_close(run(model, given.ids.to(device), dual_cache(model), 7), given.logits)
