"""Gradients under a mask: right through tokens that come at once, refused through those in the cache."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from duo_id import dual_cache, duo_attention
from duo_id.common.compat import cache_of
from duo_id.common.errors import UserError
from tests.deploy.cases import build, check_equal, mask_for, padded_ids, random_ids, reference
from tests.support.pairs import pairwise

FAMILIES = ("llama", "gpt2", "gemma3_text", "gpt_oss")


def gradients(model: Any, ids: Tensor, **options: Any) -> dict[str, Tensor]:
    """Of all parameters, and of the embeddings, whose gradient is the saliency of each token."""
    model.requires_grad_(True)
    model.zero_grad(set_to_none=True)
    embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
    logits = model(inputs_embeds=embedded, **options).logits
    real = options.get("attention_mask", torch.ones_like(ids)).bool()
    logits[real].float().log_softmax(-1)[:, 5].sum().backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return found | {"embedded": embedded.grad}


def check_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(
            found[name], gradient, atol=2e-4, rtol=2e-3, msg=lambda text, name=name: f"{name}: {text}"
        )


@pairwise(
    family=FAMILIES, way=["default", "growing", "static", "no cache"], padded=[False, True], kind=["mixed", "spans"]
)
def test_the_gradient_is_that_of_dense_attention(family: str, padded: bool, way: str, kind: str) -> None:
    model = build(family)
    mask, options = mask_for(model, kind=kind), {}
    ids = random_ids(2, 40)
    if padded:
        ids, real, positions = padded_ids()
        real[0, 50:] = 0  # and one sample on the right
        options = {"attention_mask": real, "position_ids": positions}
    with reference(model, mask):
        expected = gradients(model, ids, use_cache=False, **options)
    with duo_attention(model, mask):
        ways: dict[str, dict[str, Any]] = {
            "default": {},
            "growing": {"past_key_values": dual_cache(model)},
            "static": {"past_key_values": dual_cache(model, 70)},
            "no cache": {"use_cache": False},
        }
        check_same(gradients(model, ids, **options, **ways[way]), expected)


@pytest.mark.parametrize("max_length", [None, 70])
def test_the_cache_of_a_forward_with_gradients_goes_on(max_length: int | None) -> None:
    model = build("llama").requires_grad_(True)
    mask, (ids, real, positions) = mask_for(model), padded_ids()
    with reference(model, mask), torch.no_grad():
        expected = model(ids, attention_mask=real, position_ids=positions, use_cache=False).logits
    with duo_attention(model, mask):
        cache = dual_cache(model, max_length)
        first = model(ids[:, :48], attention_mask=real[:, :48], position_ids=positions[:, :48], past_key_values=cache)
        assert cache_of(first) is cache
        for start, end in ((48, 49), (49, 55), (55, 58)):
            part = {"attention_mask": real[:, :end], "position_ids": positions[:, start:end]}
            found = model(ids[:, start:end], past_key_values=cache, **part).logits
            check_equal(found.detach(), expected[:, start:end])


@pytest.mark.parametrize("tokens", [1, 5])
def test_a_gradient_through_the_past_is_refused(tokens: int) -> None:
    """The forward is right, and so is what a gradient finds behind attention; through it there is none."""
    model, ids = build("llama").requires_grad_(True), random_ids(1, 30)
    with duo_attention(model, mask_for(model)):
        cache = dual_cache(model)
        model(ids, past_key_values=cache)
        loss = model(random_ids(1, tokens), past_key_values=cache).logits.sum()
        (behind,) = torch.autograd.grad(loss, model.model.norm.weight, retain_graph=True)
        assert behind.abs().sum() > 0
        with pytest.raises(UserError, match="cached tokens have no gradient"):
            loss.backward()


def test_frozen_models_need_nothing_of_it() -> None:
    model, ids = build("llama"), random_ids(1, 30)
    with duo_attention(model, mask_for(model)):
        cache = dual_cache(model)
        model(ids, past_key_values=cache)
        assert not model(random_ids(1, 2), past_key_values=cache).logits.requires_grad


def test_dropout_is_refused_where_it_would_be_left_out() -> None:
    model, ids = build("llama", attention_dropout=0.1), random_ids(1, 30)
    with duo_attention(model, mask_for(model)):
        expected = model(ids).logits
        model.train()
        for options in ({}, {"use_cache": False}):
            with pytest.raises(UserError, match="attention dropout"):
                model(ids, **options)
        model.eval()
        assert torch.equal(model(ids).logits, expected)


def test_attention_weights_are_refused() -> None:
    model = build("llama")
    with duo_attention(model, mask_for(model)), pytest.raises(UserError, match="output_attentions"):
        model(random_ids(1, 9), output_attentions=True)


def test_fine_tuning_under_a_mask_learns_what_it_learns_without_a_cache() -> None:
    """With the default use_cache: the same losses, step for step."""
    ids = random_ids(2, 24)
    losses = []
    for options in ({}, {"use_cache": False}):
        model = copy.deepcopy(build("llama")).requires_grad_(True)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with duo_attention(model, mask_for(model)):
            found = []
            for _ in range(4):
                loss = model(ids, labels=ids, **options).loss
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                found.append(loss.item())
        losses.append(found)
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert losses[0][-1] < losses[0][0]
