"""What a model writes, against forwards over whole texts without a cache."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from duo_id import duo_attention
from duo_id.common.errors import UserError
from duo_id.deploy import graphs, writing
from duo_id.deploy.writing import write
from tests.deploy.cases import WITH_LINEAR_ATTENTION, build, mask_for, random_ids, reference
from tests.support.tiny import tiny_model

GREEDY = torch.zeros(2)
NEVER = {10**6}  # an end that no model writes


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    yield str(request.param)
    torch._dynamo.reset()


def greedy(model: PreTrainedModel, prompts: Tensor, limit: int) -> list[list[int]]:
    """The likeliest tokens, each from a forward over all before it."""
    ids = prompts
    for _ in range(limit):
        ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    return ids[:, prompts.shape[1] :].tolist()


@pytest.mark.parametrize("kind", ["all", "mixed", "spans"])
@pytest.mark.parametrize("family", ["llama", "gpt_neox", "gemma3_text", "gpt2"])
def test_greedy_text_is_the_likeliest_under_any_mask(family: str, kind: str, device: str) -> None:
    model, prompts = build(family), random_ids(2, 40)
    mask = mask_for(model, kind=kind)
    with reference(model, mask), torch.no_grad():
        expected = greedy(model, prompts, 12)  # more than a window holds
    model = build(family).to(device)
    with duo_attention(model, mask):
        for chunk_size, graph in ((40, True), (7, True), (40, False)):
            options = {"chunk_size": chunk_size, "graph": graph}
            assert write(model, prompts.to(device), 12, GREEDY, NEVER, **options) == expected
        assert write(model, prompts[:, :1].to(device), 1, GREEDY, NEVER)  # shorter than what a capture reads


def test_a_step_that_cannot_be_captured_runs_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    model, prompts = build("llama"), random_ids(2, 40)

    def refused(step: Callable[[], object], device: torch.device) -> None:
        step()
        raise RuntimeError("operation not permitted when stream is capturing")

    with duo_attention(model, mask_for(model, kind="mixed")):
        expected = write(model, prompts, 20, GREEDY, NEVER)
        monkeypatch.setattr(graphs, "capture_graph", refused)
        with pytest.warns(UserWarning, match="cannot be captured, so writing is slower: operation not permitted"):
            assert write(model, prompts, 20, GREEDY, NEVER) == expected


def test_models_with_other_state_write_too(device: str) -> None:
    model, prompts = tiny_model("qwen3_next", **WITH_LINEAR_ATTENTION), random_ids(2, 30)
    with torch.no_grad():
        expected = greedy(model, prompts, 8)
    mask = mask_for(model, kind="all")
    model.to(device)
    with duo_attention(model, mask):
        assert write(model, prompts.to(device), 8, GREEDY, NEVER) == expected


def test_a_text_ends_with_the_first_token_that_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    model, prompts, steps = build("llama"), random_ids(2, 40), list[int]()
    with duo_attention(model, mask_for(model, kind="all")):
        whole = write(model, prompts, 20, GREEDY, NEVER, on_tokens=steps.append)
        assert steps == [40] + 20 * [1]
        end = next(token for token in whole[0][3:] if token not in whole[1])
        first = whole[0].index(end) + 1
        assert write(model, prompts, 20, GREEDY, {end, 10**6}) == [whole[0][:first], whole[1]]
        monkeypatch.setattr(writing, "CHECK_EVERY", 2)
        steps.clear()
        both = {end, whole[1][1]}
        assert [row[-1] in both for row in write(model, prompts, 20, GREEDY, both, on_tokens=steps.append)]
        assert len(steps) < 20


def test_draws_have_the_models_probabilities() -> None:
    model, prompt, rows = build("llama", vocab_size=12, pad_token_id=0), random_ids(1, 5) % 12, 3000
    with duo_attention(model, mask_for(model, kind="all")), torch.no_grad():
        logits = model(prompt, use_cache=False).logits[0, -1]
        for temperature in (float(logits.std()) * factor for factor in (0.4, 0.7, 1.0)):
            drawn = write(model, prompt.expand(rows, -1), 1, torch.full((rows,), temperature), NEVER, seed=3)
            counts = torch.tensor(drawn).flatten().bincount(minlength=12) / rows
            expected = (logits / temperature).softmax(-1)
            assert (expected - (logits / temperature / 2).softmax(-1)).abs().max() > 0.06, "temperatures must matter"
            torch.testing.assert_close(counts, expected, rtol=0, atol=0.03)
        few = write(model, prompt.expand(rows, -1), 1, torch.full((rows,), 5.0), NEVER, words=7)
        assert torch.tensor(few).max() == 6


def test_samples_have_temperatures_of_their_own_and_draws_their_seed() -> None:
    model, prompts = build("llama"), random_ids(1, 40).expand(2, -1)
    with duo_attention(model, mask_for(model, kind="all")):
        (likeliest, _), *drawn = (
            write(model, prompts, 20, torch.tensor(temperatures), NEVER, seed=seed)
            for temperatures, seed in (([0.0, 0.0], 0), ([0.0, 1.5], 1), ([0.0, 1.5], 1), ([0.0, 1.5], 2))
        )
    assert all(first == likeliest for first, _ in drawn)
    assert drawn[0] == drawn[1] != drawn[2]
    assert drawn[0][1] != likeliest


def test_a_model_whose_texts_never_end_is_refused() -> None:
    model = build("llama")
    with duo_attention(model, mask_for(model, kind="all")), pytest.raises(UserError, match="no end-of-text token"):
        write(model, random_ids(2, 40), 20, GREEDY, ())
