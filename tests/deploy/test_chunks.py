"""Which models go on after a past, and how, found by trying: exact families, and those that lose state or positions."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from duo_id.attention.interface import attached
from duo_id.common.compat import cache_argument, cache_of
from duo_id.common.errors import UserError
from duo_id.deploy import chunks
from duo_id.deploy.chunks import CHUNK, CHUNKS, PAST, Continuation, check_chunks, continuation
from duo_id.deploy.install import duo_attention
from tests.support import families
from tests.support.families import mask_of

IN_BFLOAT16 = ("llama", "gpt2", "gemma3_text", "granitemoehybrid", "jamba", "bamba")
EXACT = "llama qwen3_moe gpt2 gemma2 gemma3_text lfm2 granitemoehybrid qwen3_next nemotron_h roberta".split()
OTHERS = {"jamba": Continuation(stepwise=True), "bamba": Continuation(positions=True)}


@contextmanager
def masked(family: str, dtype: torch.dtype = torch.float32) -> Iterator[PreTrainedModel]:
    model = families.tiny_model(family).to(dtype)
    with attached(model) as layers:
        mask = mask_of(model, layers)
    with duo_attention(model, mask):
        yield model


def text(tokens: int = 40, seed: int = 1) -> Tensor:
    return torch.randint(3, 90, (1, tokens), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def pieces(model: PreTrainedModel, ids: Tensor, sizes: list[int], how: Continuation) -> Tensor:
    found, cache, past = [], None, 0
    for part in ids.split(sizes, 1):
        given = {} if cache is None else {cache_argument(model): cache}
        output = model(part, use_cache=True, **given, **how.options(part, past))
        cache, past = cache_of(output), past + part.shape[1]
        found.append(output.logits)
    return torch.cat(found, 1)


@pytest.mark.parametrize(
    ("family", "dtype"),
    [
        *((family, torch.float32) for family in (*EXACT, *OTHERS)),
        *((family, torch.bfloat16) for family in IN_BFLOAT16),
    ],
    ids=str,
)
def test_what_is_found_is_right_for_other_texts_and_pieces(family: str, dtype: torch.dtype) -> None:
    expected = OTHERS.get(family, Continuation())
    with masked(family, dtype) as model, torch.no_grad():
        how = continuation(model, text())
        assert how == expected
        if dtype is torch.bfloat16:
            return
        ids = text(seed=2)
        whole = model(ids, use_cache=False).logits
        sizes = [29] + [1] * 11 if how.stepwise else [13, 20, 7]
        torch.testing.assert_close(pieces(model, ids, sizes, how), whole, atol=1e-3, rtol=1e-3)
        if how != Continuation():
            assert (pieces(model, ids, [13, 20, 7], Continuation()) - whole).abs().max() > 0.1


def test_it_is_tried_once_a_model_in_five_forwards(monkeypatch: pytest.MonkeyPatch) -> None:
    with masked("llama") as model:
        seen: list[tuple[int, ...]] = []
        embeddings = model.get_input_embeddings()
        embeddings.register_forward_pre_hook(lambda module, args: seen.append(tuple(args[0].shape)))
        for _ in range(2):
            assert continuation(model, text(7).expand(3, -1)) == Continuation()
        assert seen == [(1, PAST + CHUNKS * CHUNK), (1, PAST)] + [(1, CHUNK)] * CHUNKS
    monkeypatch.setattr(chunks, "_find_continuation", lambda model, ids: pytest.fail("it was tried again"))
    with masked("llama") as other, pytest.raises(pytest.fail.Exception):
        continuation(other, text())
    continuation(model, text())


class Amnesia(nn.Module):
    """Adds the mean of all tokens so far, which it forgets at every forward: no way to go on is right."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, states: Tensor, *args: Any, **kwargs: Any) -> Any:
        counts = torch.arange(1, states.shape[1] + 1, device=states.device)[:, None]
        return self.inner(states + states.cumsum(1) / counts, *args, **kwargs)


def test_a_model_that_a_cache_never_suits_is_refused_by_name() -> None:
    with masked("llama") as model:
        model.model.layers[1].mlp = Amnesia(model.model.layers[1].mlp)
        with pytest.raises(UserError, match=r"^LlamaForCausalLM: .* by \d+%, even token by token.*use_cache=False"):
            continuation(model, text())


def test_a_model_that_takes_no_cache_but_its_own_is_refused_by_name() -> None:
    with (
        masked("minimax") as model,
        pytest.raises(UserError, match=r"^MiniMaxForCausalLM does not accept a dual cache: "),
    ):
        continuation(model, text())


def test_rounding_is_no_fault_and_the_type_says_how_much_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """An error of 3% may be rounding in bfloat16, whoever chose it, and is a fault in float32."""
    plain = chunks._logits_in_chunks

    def noisy(model: PreTrainedModel, ids: Tensor, how: Continuation) -> Tensor:
        logits = plain(model, ids, how)
        noise = torch.randn(logits.shape, generator=torch.Generator().manual_seed(0))
        return logits + 0.03 * logits.float().std(-1, keepdim=True) * noise

    monkeypatch.setattr(chunks, "_logits_in_chunks", noisy)
    with masked("llama", torch.bfloat16) as model:
        assert continuation(model, text()) == Continuation()
    with masked("llama") as model:
        with pytest.raises(UserError, match="by 3%"):
            continuation(model, text())
        logits = model(text()).logits
        assert chunks._tolerance(model, logits) == 0.01
        with torch.autocast("cpu", torch.bfloat16):
            assert chunks._tolerance(model, logits) > 0.08


def test_chunks_are_refused_where_they_change_the_logits() -> None:
    with masked("jamba") as model:
        assert check_chunks(model, text(), 40, 0) == Continuation()
        for size, past, right in (
            (20, 0, r"use chunk_size=40, the whole prompt"),
            (40, 5, r"chunk_size=1 after"),
        ):
            with pytest.raises(UserError, match=rf"^chunk_size={size}: JambaForCausalLM .*{right}"):
                check_chunks(model, text(), size, past)
        assert check_chunks(model, text(), 1, 0).stepwise
        assert check_chunks(model, text(1), 40, 5).stepwise
    with masked("bamba") as model:
        assert check_chunks(model, text(), 20, 0).positions
    with masked("llama") as model:
        assert check_chunks(model, text(), 7, 3) == Continuation()
