"""Steps that are captured where there is a GPU, against forwards over whole texts."""

import gc
import weakref
from collections.abc import Callable

import pytest
import torch

from duo_id import dual_cache, duo_attention
from duo_id.deploy import graphs
from duo_id.deploy.chunks import Continuation, continuation
from duo_id.deploy.graphs import DecodeSteps, capture_graph
from tests.deploy.cases import WITH_LINEAR_ATTENTION, build, check_equal, mask_for, random_ids
from tests.support.tiny import tiny_model

PROMPT, TOKENS = 30, 40


def test_on_the_cpu_nothing_is_captured() -> None:
    done = []

    def step() -> None:
        done.append(1)

    assert capture_graph(step, torch.device("cpu")) is step
    assert len(done) == 1, "the step runs once more, as it does where it is captured"


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("max_length", [None, TOKENS, "fork"], ids=["growing", "static", "forked"])
@pytest.mark.parametrize("family", ["llama", "gpt_neox", "gemma3_text", "gpt2"])
def test_steps_are_those_of_whole_texts(family: str, max_length: int | str | None, device: str) -> None:
    """The logits of a step also stay as they are when the next one runs."""
    model, ids = build(family).to(device), random_ids(2, TOKENS).to(device)
    with duo_attention(model, mask_for(model)), torch.no_grad():
        wanted = model(ids, use_cache=False).logits[:, PROMPT:]
        how = continuation(model, ids)
        cache = dual_cache(model, max_length if isinstance(max_length, int) else None)
        model(ids[:, :PROMPT], use_cache=True, past_key_values=cache)
        if max_length == "fork":
            cache = cache.fork(torch.tensor([1, 0]), TOKENS)
            ids, wanted = ids.flip(0), wanted.flip(0)
        steps = DecodeSteps(model, cache, how)
        assert steps.captures == (max_length is not None)
        found = [steps(ids[:, place : place + 1], place) for place in range(PROMPT, TOKENS)]
    check_equal(torch.stack(found, 1).cpu(), wanted.cpu())


def test_models_with_other_state_are_not_captured() -> None:
    model, ids = tiny_model("qwen3_next", **WITH_LINEAR_ATTENTION), random_ids(2, TOKENS)
    with duo_attention(model, mask_for(model)), torch.no_grad():
        assert not graphs.can_capture(model, dual_cache(model), continuation(model, ids))
        assert not graphs.can_capture(model, dual_cache(model), Continuation(stepwise=True))


def test_nothing_keeps_a_cache_alive() -> None:
    """Not even until garbage is collected, which a GPU's memory does not start."""
    model, ids = build("llama"), random_ids(2, TOKENS)
    with duo_attention(model, mask_for(model)), torch.no_grad():
        for max_length in (None, TOKENS):
            cache = dual_cache(model, max_length)
            model(ids[:, :PROMPT], use_cache=True, past_key_values=cache)
            alive, steps = weakref.ref(cache), DecodeSteps(model, cache, continuation(model, ids))
            for place in range(PROMPT, TOKENS):
                steps(ids[:, place : place + 1], place)
            gc.disable()
            try:
                del cache, steps
                assert alive() is None
            finally:
                gc.enable()


def test_a_capture_that_fails_halfway_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = build("llama"), random_ids(2, TOKENS)
    with duo_attention(model, mask_for(model)), torch.no_grad():
        wanted = model(ids, use_cache=False).logits[:, PROMPT:]
        cache = dual_cache(model, TOKENS)

        def interrupted(step: Callable[[], object], device: torch.device) -> None:
            step()
            cache.tokens.running = cache.tokens.announced = True  # as an error within a captured forward leaves them
            raise RuntimeError("operation not permitted when stream is capturing")

        monkeypatch.setattr(graphs, "capture_graph", interrupted)
        model(ids[:, :PROMPT], use_cache=True, past_key_values=cache)
        steps = DecodeSteps(model, cache, continuation(model, ids))
        with pytest.warns(UserWarning, match="cannot be captured, so writing is slower: operation not permitted"):
            found = [steps(ids[:, place : place + 1], place) for place in range(PROMPT, TOKENS)]
    check_equal(torch.stack(found, 1), wanted)


def test_a_step_that_fails_is_no_capture_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = build("llama"), random_ids(2, TOKENS)

    def out_of_memory(step: object, device: torch.device) -> None:
        raise torch.OutOfMemoryError("no memory left")

    with duo_attention(model, mask_for(model)), torch.no_grad():
        cache = dual_cache(model, TOKENS)
        model(ids[:, :PROMPT], use_cache=True, past_key_values=cache)
        steps = DecodeSteps(model, cache, continuation(model, ids))
        steps(ids[:, PROMPT : PROMPT + 1], PROMPT)
        monkeypatch.setattr(graphs, "capture_graph", out_of_memory)
        with pytest.raises(torch.OutOfMemoryError):
            steps(ids[:, PROMPT + 1 : PROMPT + 2], PROMPT + 1)
