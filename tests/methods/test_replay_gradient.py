"""Replay gradient, against plain autograd over a model's own attention, against finite differences, and its memory."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from duo_id.attention.window import Window
from duo_id.common.errors import UserError
from duo_id.data.haystack import tokenize
from duo_id.methods import replay_gradient as module
from duo_id.methods.replay import REQUEST, Replay, replayed
from duo_id.methods.replay_gradient import find, gradient_norms, replay_gradient
from duo_id.methods.run import Run
from duo_id.step.recompute import Keep, activation_checkpointing
from duo_id.step.settings import StepSettings
from tests.methods.conftest import WINDOW, gated_model_of, grouped, one_word_tokenizer, settings
from tests.methods.test_attention_weights import SHARED
from tests.support.planted import random_sample

MakeModel = Callable[..., PreTrainedModel]
ASKED = len(tokenize(one_word_tokenizer(), REQUEST))
TOKENS = 30


def own_pass(model: PreTrainedModel, ids: Tensor) -> tuple[list[Tensor], list[Tensor], list[Tensor], Tensor]:
    """A model's own eager pass, by layer: attention weights and values of query heads, what heads write; last states.

    Weights (heads, tokens, tokens), values and outputs (heads, tokens, dim).
    """
    outputs: list[Tensor] = []
    values: list[Tensor] = []
    last: list[Tensor] = []

    def output_hook(part: Any, args: tuple[Tensor]) -> None:
        args[0].requires_grad_(True) if args[0].is_leaf else args[0].retain_grad()
        outputs.append(args[0])

    model.set_attn_implementation("eager")
    layers: Any = model.model.layers
    hooks = [layer.self_attn.o_proj.register_forward_pre_hook(output_hook) for layer in layers]
    hooks += [layer.self_attn.v_proj.register_forward_hook(lambda *call: values.append(call[2])) for layer in layers]
    hooks.append(layers[-1].register_forward_hook(lambda *call: last.append(call[2])))
    weights = model(ids[None], use_cache=False, output_attentions=True).attentions
    for hook in hooks:
        hook.remove()
    states = last[0] if isinstance(last[0], Tensor) else last[0][0]
    kv_heads, heads = model.config.num_key_value_heads, model.config.num_attention_heads
    split = [value[0].unflatten(-1, (kv_heads, -1)).transpose(0, 1) for value in values]
    grouped_values = [value.repeat_interleave(heads // kv_heads, 0).detach() for value in split]
    return [weight[0].detach() for weight in weights], grouped_values, outputs, states[0]


@pytest.mark.parametrize("window", [WINDOW, Window(5, 25)], ids=["short", "long"])  # the second still sees some
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_score_is_what_plain_autograd_gives(family: str, window: Window, reduction: str, make_model: MakeModel) -> None:
    model, sample = make_model(family), random_sample(TOKENS, 1)
    text = sample["input_ids"]
    ids = torch.cat([text, torch.full((ASKED,), 12), text])
    probes = range(TOKENS + ASKED - 1, len(ids) - 1)
    with gated_model_of(model, window) as gated_model:
        scores = replay_gradient(gated_model, sample, settings(reduction))
    weights, values, outputs, states = own_pass(model, ids)
    total = sum(states[probe].square().sum() for probe in probes)
    assert isinstance(total, Tensor)
    total.backward()
    for layer in range(3):
        assert outputs[layer].grad is not None
        gradient = (outputs[layer].grad[0] / total.detach()).unflatten(-1, (4, -1))  # (tokens, heads, dim)
        highest = torch.zeros(4, TOKENS)
        for probe in probes:
            for token in range(window.sink_size, TOKENS):
                if probe - token >= window.recent_size:
                    added = weights[layer][:, probe, token] * values[layer][:, token].norm(dim=-1)
                    highest[:, token] = torch.maximum(highest[:, token], added * gradient[probe].norm(dim=-1))
        expected = grouped(highest[:, window.sink_size :].mean(-1), 2, reduction)
        torch.testing.assert_close(scores[layer], expected, rtol=1e-3, atol=1e-8)
    assert scores.min() > 0


def test_gradient_is_what_a_change_of_a_heads_output_does(make_model: MakeModel, monkeypatch: Any) -> None:
    """By central differences in float64, of each dimension of one head's output at one token."""
    model, plain = make_model("gpt_neox").double(), module.full_attention
    with gated_model_of(model) as gated_model:
        replay = replayed(gated_model, random_sample(TOKENS, 1), "replay_gradient")
        norms = gradient_norms(gated_model, replay)
        layer, head, probe = 1, 3, 7
        position = int(replay.queries[probe])

        def size(change: Tensor) -> Tensor:
            """The last states' summed squares, with a change of this head's output."""
            calls, last = [0], list[Tensor]()

            def changed(*arguments: Any) -> Tensor:
                out = plain(*arguments).clone()
                if calls[0] == layer:
                    out[0, head, position] += change
                calls[0] += 1
                return out

            block: Any = model.base_model.layers[-1]
            hook = block.register_forward_hook(lambda *call: last.append(call[2]))
            with monkeypatch.context() as patch, torch.no_grad():
                patch.setattr("duo_id.attention.functions.full_attention", changed)
                gated_model.model.hidden_states({"input_ids": replay.ids[None]})
            hook.remove()
            states = last[0] if isinstance(last[0], Tensor) else last[0][0]
            return states[0, replay.queries].square().sum()

        steps = 1e-4 * torch.eye(8, dtype=torch.float64)
        slopes = torch.stack([(size(step) - size(-step)) / 2e-4 for step in steps])
    torch.testing.assert_close(
        norms[layer][0][head, probe], (slopes.norm() / size(0 * steps[0])).float(), rtol=1e-4, atol=0
    )


@pytest.mark.parametrize("memory", ["auto", "outputs", "least"])
def test_layers_may_keep_less(memory: str, make_model: MakeModel) -> None:
    sample = random_sample(TOKENS, 1)
    with gated_model_of(make_model("llama")) as gated_model:
        expected = replay_gradient(gated_model, sample, settings())
        samples: Any = type("Samples", (), {"samples": lambda self, split, count: [sample]})()
        pattern = find(gated_model, samples, settings(), Run(step=StepSettings(memory=memory)))
    torch.testing.assert_close(pattern.scores, expected, rtol=1e-4, atol=1e-9)


def test_what_is_recomputed_counts_once(make_model: MakeModel) -> None:
    with gated_model_of(make_model("llama")) as gated_model:
        replay = replayed(gated_model, random_sample(TOKENS, 1), "replay_gradient")
        expected = gradient_norms(gated_model, replay)
        with activation_checkpointing(gated_model.model.model, gated_model.layers, Keep.INPUT):
            norms = gradient_norms(gated_model, replay)
    assert {index: len(found) for index, found in norms.items()} == {0: 1, 1: 1, 2: 1}
    torch.testing.assert_close(norms, expected)


def test_layers_that_share_keys_have_gradients_of_their_own(make_model: MakeModel) -> None:
    model = make_model("gemma3n_text", **SHARED)
    with gated_model_of(model) as gated_model:
        replay = replayed(gated_model, random_sample(TOKENS, 1), "replay_gradient")
        norms = gradient_norms(gated_model, replay)
        assert {layer.index: len(norms[layer.index]) for layer in gated_model.layers} == {
            layer.index: 1 + len(layer.sharers) for layer in gated_model.layers
        }
        assert max(map(len, norms.values())) > 1
        assert replay_gradient(gated_model, random_sample(TOKENS, 1), settings()).min() > 0


def test_the_model_keeps_no_hook(make_model: MakeModel) -> None:
    model = make_model("llama")
    block: Any = model.model.layers[-1]
    with gated_model_of(model) as gated_model, torch.no_grad():  # as whoever calls it may have it
        replay_gradient(gated_model, random_sample(TOKENS, 1), settings())
        broken = replace(gated_model, layers=())
        with pytest.raises(IndexError):
            gradient_norms(broken, Replay(torch.zeros(1), 1, torch.zeros(1)))
    assert not block._forward_hooks


def test_texts_that_no_window_loses_are_refused(make_model: MakeModel) -> None:
    with (
        gated_model_of(make_model("llama"), Window(3, 400)) as gated_model,
        pytest.raises(UserError, match=r"^method=attention_profile repeats .*data\.length_min.*recent_size"),
    ):
        replay_gradient(gated_model, random_sample(60, 1), settings())
