"""Whole models under a head mask on a GPU, where other kernels run and the compiler sets in."""

from collections.abc import Iterator

import pytest
import torch
import torch._dynamo.utils
from torch import Tensor
from transformers import PreTrainedModel

from duo_id import HeadMask, dual_cache, duo_attention, prefill
from tests.deploy.cases import (
    LENGTHS,
    PROMPT,
    TOKENS,
    build,
    case,
    mask_for,
    padded_ids,
    random_ids,
    reference,
    run,
)

pytestmark = pytest.mark.gpu
FAMILIES = ("llama", "gpt_neox", "gemma3_text")


@pytest.fixture
def model() -> Iterator[PreTrainedModel]:
    """The model of `case("llama")`, on the GPU while the test runs."""
    yield build("llama").cuda()
    torch._dynamo.reset()


def check_close(found: Tensor, expected: Tensor) -> None:
    """Against logits from the CPU: sums run in another order."""
    error = (found.cpu().float() - expected).abs().max() / expected.abs().max().clamp(min=1)
    assert error <= 5e-5, f"error {error:.1e}"


@pytest.mark.parametrize("max_length", [None, TOKENS])
@pytest.mark.parametrize("chunk", [1, 7, 40, PROMPT])
@pytest.mark.parametrize("family", FAMILIES)
def test_chunks_and_steps(family: str, chunk: int, max_length: int | None) -> None:
    given, model = case(family), build(family).cuda()
    padded, real, positions = (x.cuda() for x in padded_ids())
    with duo_attention(model, given.mask):
        check_close(run(model, given.ids.cuda(), dual_cache(model, max_length), chunk), given.logits)
        check_close(model(given.ids.cuda(), use_cache=False).logits, given.logits)
        found = run(model, padded, dual_cache(model, max_length), chunk, real)
        check_close(found[real == 1], given.padded_logits[real.cpu() == 1])
        found = model(padded, attention_mask=real, position_ids=positions, use_cache=False).logits
        check_close(found[real == 1], given.padded_logits[real.cpu() == 1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_longer_prompt_in_chunks(dtype: torch.dtype) -> None:
    model, ids = build("llama", max_position_embeddings=4096).to(dtype), random_ids(1, 1500)
    mask = mask_for(model, 64, 256)
    with reference(model, mask):
        expected = model(ids, use_cache=False).logits[:, -1].float()
    model.cuda()
    with duo_attention(model, mask):
        for chunk in (1500, 512, 100):
            found = prefill(model, ids.cuda(), dual_cache(model), chunk).cpu().float()
            error = (found - expected).norm() / expected.norm()
            assert error <= (5e-5 if dtype == torch.float32 else 5e-2), f"error {error:.1e}"


def test_a_decode_step_does_not_wait_for_the_device(model: PreTrainedModel) -> None:
    mask, ids = mask_for(model), random_ids(2, TOKENS).cuda()
    padded, real, positions = (x.cuda() for x in padded_ids())
    with duo_attention(model, mask), torch.no_grad():
        cache, other = dual_cache(model), dual_cache(model)
        model(ids[:, :PROMPT], past_key_values=cache)
        model(padded[:, :PROMPT], past_key_values=other, attention_mask=real[:, :PROMPT])
        model(ids[:, PROMPT : PROMPT + 1], past_key_values=cache)  # compiles the kernel
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            for token in range(PROMPT + 1, TOKENS):
                model(ids[:, token : token + 1], past_key_values=cache)
            for token in range(PROMPT, TOKENS):
                part = slice(token, token + 1)
                options = {"position_ids": positions[:, part], "attention_mask": real[:, : token + 1]}
                model(padded[:, part], past_key_values=other, **options)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert cache.tokens.lengths.tolist() == [TOKENS, TOKENS]
    assert other.tokens.lengths.tolist() == [length + TOKENS - PROMPT for length in LENGTHS]


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
@pytest.mark.parametrize("kind", ["mixed", "none"])
def test_static_generation_is_compiled_and_writes_the_same(family: str, kind: str) -> None:
    given, model = case(family, kind), build(family).cuda()
    ids, real, _ = (x[:, :PROMPT].cuda() for x in padded_ids())
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
        assert graphs[0] == graphs[1] > 0
    assert "_compiled_call" not in vars(model)
    torch._dynamo.reset()


def test_replay_of_a_captured_decode_step(model: PreTrainedModel) -> None:
    """A whole step in one CUDA graph: replayed, it goes on from where the cache is, also after a reorder."""
    given, ids = case("llama"), case("llama").ids.cuda()
    with duo_attention(model, given.mask), torch.no_grad():
        cache = dual_cache(model, 100)
        new, at = ids[:, :1].clone(), torch.zeros(2, 1, dtype=torch.long, device="cuda")
        model(ids[:, :PROMPT], past_key_values=cache)
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            model(new, past_key_values=cache, position_ids=at)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits = model(new, past_key_values=cache, position_ids=at).logits

        def replay(token: int, order: list[int]) -> None:
            new.copy_(ids[order, token : token + 1])
            at.fill_(token)
            graph.replay()
            check_close(logits, given.logits[order, token : token + 1])

        cache.reset()
        model(ids[:, :PROMPT], past_key_values=cache)
        for token in range(PROMPT, PROMPT + 6):
            replay(token, [0, 1])
        cache.reorder_cache(torch.tensor([1, 0], device="cuda"))
        for token in range(PROMPT + 6, PROMPT + 12):
            replay(token, [1, 0])
        assert cache.get_seq_length() == PROMPT + 12


def test_several_masks_at_once_on_one_gpu() -> None:
    for kind in ("mixed", "all", "none"):
        given = case("llama", kind)
        model = build("llama").cuda()
        assert isinstance(given.mask, HeadMask)
        with duo_attention(model, given.mask):
            check_close(run(model, given.ids.cuda(), dual_cache(model), 7), given.logits)
