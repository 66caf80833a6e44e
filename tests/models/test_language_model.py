"""Hidden states and logits of a language model, against the model's own."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from duo_id.models.language_model import LanguageModel, end_tokens
from duo_id.models.loading import byte_tokenizer
from tests.support import families
from tests.support.tiny import compute_all_logits


def wrapped(model: PreTrainedModel) -> LanguageModel:
    return LanguageModel(model, byte_tokenizer(), "tiny", "tiny", None, "random")


def tokens(*shape: int) -> Tensor:
    return torch.randint(3, 96, shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt_neox"])
def test_states_and_logits_are_those_of_the_model(family: str, make_model: Callable[..., PreTrainedModel]) -> None:
    model, ids = make_model(family), tokens(2, 17)
    expected = model(ids, output_hidden_states=True)
    batch = {"input_ids": ids, "attention_mask": None}
    states = wrapped(model).hidden_states(batch)
    torch.testing.assert_close(states, expected.hidden_states[-1])
    positions = torch.tensor([0, 5, 16])
    torch.testing.assert_close(wrapped(model).logits(states[:, positions]), expected.logits[:, positions])


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", ["llama", "gpt_neox", "gpt2"])  # the last learns a vector for each position
def test_padding_changes_no_real_token(side: str, family: str, make_model: Callable[..., PreTrainedModel]) -> None:
    model, ids = make_model(family), tokens(1, 11)
    alone = model(ids, output_hidden_states=True)
    real = slice(6, 17) if side == "left" else slice(0, 11)
    padded, mask = torch.zeros(2, 17, dtype=torch.long), torch.zeros(2, 17, dtype=torch.bool)
    padded[0, real], mask[0, real] = ids[0], True
    padded[1], mask[1] = tokens(17), True
    batch = {"input_ids": padded, "attention_mask": mask}
    states = wrapped(model).hidden_states(batch)[:1, real]
    torch.testing.assert_close(states, alone.hidden_states[-1], atol=1e-5, rtol=1e-5)
    logits = wrapped(model).logits(states[:, -3:])
    torch.testing.assert_close(logits, alone.logits[:, -3:], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", ["roberta", "camembert", "data2vec-text", "opt", "biogpt"])
def test_padding_changes_no_real_token_where_positions_do_not_begin_at_0(side: str, family: str) -> None:
    model, ids = wrapped(families.tiny_model(family)), tokens(1, 11).clamp(max=89)
    alone = model.hidden_states({"input_ids": ids, "attention_mask": None})
    placed = {"input_ids": ids, "attention_mask": None, "position_ids": torch.arange(11)[None]}
    torch.testing.assert_close(model.hidden_states(placed), alone)
    real = slice(6, 17) if side == "left" else slice(0, 11)
    padded, mask = torch.zeros(1, 17, dtype=torch.long), torch.zeros(1, 17, dtype=torch.bool)
    padded[0, real], mask[0, real] = ids[0], True
    states = model.hidden_states({"input_ids": padded, "attention_mask": mask})[:, real]
    torch.testing.assert_close(states, alone, atol=1e-5, rtol=1e-5)


def test_only_the_wanted_logits_are_computed(make_model: Callable[..., PreTrainedModel]) -> None:
    model, seen = make_model("llama"), []
    model.lm_head.register_forward_hook(lambda module, inputs, output: seen.append(output.shape[1]))
    states = wrapped(model).hidden_states({"input_ids": tokens(1, 20)})
    assert seen == []
    wrapped(model).logits(states[0, [3, 4]])
    assert seen == [2]


@pytest.mark.parametrize("leading", [(), (4,), (2, 3), (0,)])
def test_logits_keep_the_shape_of_their_states(leading: tuple[int, ...], make_model: Callable[..., Any]) -> None:
    model = wrapped(make_model("llama"))
    states = torch.randn(*leading, 5, 32, generator=torch.Generator().manual_seed(0))
    expected = states @ model.model.lm_head.weight.T
    torch.testing.assert_close(model.logits(states), expected)
    torch.testing.assert_close(model.logits(states[..., :0, :]), expected[..., :0, :])


def test_layers_run_again_after_logits_even_after_an_exception(make_model: Callable[..., PreTrainedModel]) -> None:
    model, ids = make_model("llama"), tokens(1, 20)
    expected, trunk = model(ids).logits, model.model
    states = wrapped(model).hidden_states({"input_ids": ids})
    forward = trunk.forward

    def fails(*_: Any) -> None:
        raise RuntimeError("on purpose")

    for replaced in (False, True):  # such as by a library that wraps the forward of a module
        if replaced:
            trunk.forward = forward
        hook = model.lm_head.register_forward_pre_hook(fails)
        with pytest.raises(RuntimeError, match="on purpose"):
            wrapped(model).logits(states)
        hook.remove()
        assert trunk.__dict__.get("forward") == (forward if replaced else None)
        assert torch.equal(wrapped(model).logits(states), expected)
        assert trunk.__dict__.get("forward") == (forward if replaced else None)
        assert torch.equal(model(ids).logits, expected)


SCORED = torch.tensor([3, 3, 9, 13, 20, 27, 30, 41, 2])  # of 3 samples of 14 tokens; one comes twice


def predictions(model: LanguageModel, batch: dict[str, Any]) -> Tensor:
    """The logits that predict the scored tokens."""
    return model.logits(model.predicting(model.hidden_states(batch), SCORED))


@pytest.mark.parametrize(
    "family",
    "llama gpt2 gpt_neox opt bert bart cohere granite gemma2 gemma3n_text minicpm3 moshi mamba rembert falcon".split(),
)
def test_predictions_are_the_models_own_with_their_gradient(family: str) -> None:
    """Also of models that cap or scale their logits, or change the states in front of the head."""
    model, ids = families.tiny_model(family), tokens(3, 14)
    batch = {"input_ids": ids, "attention_mask": None}
    weight, computed = model.get_input_embeddings().weight.requires_grad_(), []
    model.get_output_embeddings().register_forward_hook(lambda module, inputs, output: computed.append(output.shape))
    logits = predictions(wrapped(model), batch)
    assert [tuple(shape[:2]) for shape in computed] == [(1, len(SCORED))]
    expected = model(ids, use_cache=False).logits.flatten(0, 1)[SCORED - 1]
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
    gradients = [torch.autograd.grad(x.square().mean(), weight)[0] for x in (logits, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)


def test_predictions_without_a_head_that_can_be_found(make_model: Callable[..., PreTrainedModel]) -> None:
    model, ids = make_model("llama"), tokens(3, 14)
    batch, expected = {"input_ids": ids, "attention_mask": None}, model(ids).logits.flatten(0, 1)[SCORED - 1]
    for other in (None, torch.nn.Linear(1, 1)):  # there is none, or another module computes the logits
        model.get_output_embeddings = lambda other=other: other
        torch.testing.assert_close(predictions(wrapped(model), batch), expected)


def test_the_head_of_a_forward_computes_some_tokens_alone(make_model: Callable[..., PreTrainedModel]) -> None:
    model, ids = make_model("gemma2", final_logit_softcapping=2.0), tokens(3, 14)
    expected, head = model(ids).logits.flatten(0, 1)[SCORED], model.get_output_embeddings()
    for other, rows in ((head, len(SCORED)), (None, 42), (torch.nn.Linear(1, 1), 42)):  # the last two are not found
        model.get_output_embeddings = lambda other=other: other
        with wrapped(model).head_at(ids, SCORED) as pick:
            logits = model(ids).logits
        assert logits.flatten(0, 1).shape[0] == rows
        torch.testing.assert_close(pick(logits), expected)
        assert not head._forward_pre_hooks


def test_models_that_cannot_leave_logits_out_do_as_well(
    make_model: Callable[..., PreTrainedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ids = make_model("llama"), tokens(3, 14)
    expected = model(ids).logits.flatten(0, 1)[SCORED - 1]
    compute_all_logits(model, monkeypatch)
    torch.testing.assert_close(predictions(wrapped(model), {"input_ids": ids}), expected)


def test_all_ends_of_a_text_are_known(make_model: Callable[..., PreTrainedModel]) -> None:
    model = LanguageModel(make_model("llama"), byte_tokenizer(), "tiny", "tiny", None, "random")
    config: Any = model.model.generation_config
    assert end_tokens(model) == {model.tokenizer.eos_token_id, 2}
    config.eos_token_id = [5, 7]
    assert end_tokens(model) == {model.tokenizer.eos_token_id, 5, 7}
    model.tokenizer.eos_token = config.eos_token_id = None
    assert end_tokens(model) == set()
