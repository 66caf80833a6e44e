"""Attention weights a few queries at a time, against a softmax over the full matrix."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from duo_id.attention.interface import bound_functions
from duo_id.attention.softmax import Softmax
from duo_id.methods.anatomy import answer_attention
from duo_id.methods.attention_weights import ROWS, attention_rows, score_attention
from tests.methods.conftest import gated_model_of, grouped, haystack
from tests.step.test_distillation import HYBRID
from tests.support.dense import dense_attention
from tests.support.tiny import FAMILIES, tiny_model

MakeModel = Callable[..., PreTrainedModel]
Rows = Iterator[tuple[Tensor, Tensor]]
SHARED: dict[str, Any] = {
    "num_hidden_layers": 4, "num_kv_shared_layers": 2, "layer_types": ["sliding_attention", "full_attention"] * 2,
    "sliding_window": 9, "head_dim": 16, "vocab_size_per_layer_input": 96, "hidden_size_per_layer_input": 8,
    "laurel_rank": 4, "altup_num_inputs": 2, "activation_sparsity_pattern": [0.0] * 4,
}  # fmt: skip
MODELS: list[tuple[str, dict[str, Any]]] = [*((family, {}) for family in FAMILIES), ("gemma3_text", HYBRID)]


@pytest.mark.parametrize("queries", [[0], [9, 3, 149], list(range(150))], ids=["first", "some", "all"])
@pytest.mark.parametrize(("family", "changes"), MODELS, ids=[name for name, _ in MODELS])
def test_weights_are_those_of_the_full_matrix(
    family: str, changes: dict[str, Any], queries: list[int], make_model: MakeModel
) -> None:
    model = make_model(family, **changes)
    ids = torch.randint(3, 96, (150,), generator=torch.Generator().manual_seed(1))
    with dense_attention(model) as seen:
        model(ids[None], use_cache=False)
    collected: list[Tensor] = []

    def keep(rows: Rows) -> Tensor:
        parts = list(rows)
        assert torch.cat([positions for positions, _ in parts]).tolist() == queries
        assert all(len(positions) <= ROWS for positions, _ in parts)
        collected.append(torch.cat([part for _, part in parts], 1))
        return collected[-1][:, -1, 0]

    with gated_model_of(model) as gated_model:
        functions = bound_functions(gated_model.layers)
        scores = score_attention(gated_model, ids, torch.tensor(queries), keep, "max")
        assert bound_functions(gated_model.layers) == functions
        layers = [layer.index for layer in gated_model.layers]
        shape = gated_model.shape
    assert scores.shape == shape
    assert len(collected) == len(layers)
    for index, layer_weights in zip(layers, collected, strict=True):
        torch.testing.assert_close(layer_weights, seen.weights[index][:, queries], rtol=1e-4, atol=2e-6)


def test_layers_that_share_keys_count_as_further_query_heads(reduction: str) -> None:
    """Layers 2 and 3 read the keys of layers 0 and 1, of which the second has gates."""
    model = tiny_model("gemma3n_text", **SHARED)
    ids = torch.randint(3, 96, (30,), generator=torch.Generator().manual_seed(1))
    with dense_attention(model) as seen:
        model(ids[None], use_cache=False)

    def last(rows: Rows) -> Tensor:
        return torch.cat([part for _, part in rows], 1)[:, -1, 3]

    with gated_model_of(model) as gated_model:
        assert [layer.index for layer in gated_model.layers] == [1]
        scores = score_attention(gated_model, ids, torch.tensor([5, 20]), last, reduction)
    attention = answer_attention(model, haystack(30, (5, 20, 2)), [(1, 0)])[(1, 0)]
    heads = torch.cat([seen.weights[layer][:, 20, 3].unflatten(0, (2, -1)) for layer in (1, 3)], 1)
    torch.testing.assert_close(scores[0], heads.amax(1) if reduction == "max" else heads.mean(1), rtol=1e-4, atol=1e-6)
    assert attention.shape == (2, 30)
    torch.testing.assert_close(attention.sum(-1), torch.ones(2), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_query_heads_become_kv_heads(family: str, reduction: str, make_model: MakeModel) -> None:
    model = make_model(family)
    ids = torch.randint(3, 96, (30,), generator=torch.Generator().manual_seed(1))
    with dense_attention(model) as seen:
        model(ids[None], use_cache=False)

    def on_the_second(rows: Rows) -> Tensor:
        return sum(part[:, :, 1].sum(-1) for _, part in rows)  # type: ignore[return-value]

    with gated_model_of(model) as gated_model:
        scores = score_attention(gated_model, ids, torch.arange(30), on_the_second, reduction)
        kv_heads = gated_model.shape[1]
    columns = [seen.weights[layer][:, :, 1].sum(-1) for layer in range(3)]
    expected = torch.stack([grouped(column, kv_heads, reduction) for column in columns])
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-5)
    assert (scores.dtype, scores.device.type) == (torch.float32, "cpu")


@pytest.mark.parametrize("scale", [None, 0.7])
def test_scale(scale: float | None) -> None:
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(1, 6, 20, 4, generator=generator), torch.randn(1, 2, 20, 4, generator=generator)
    ((positions, weights),) = list(
        attention_rows(query.bfloat16(), key.bfloat16(), torch.tensor([0, 7, 19]), Softmax(scale))
    )
    assert positions.tolist() == [0, 7, 19]
    assert weights.dtype == torch.float32
    for head in range(6):
        for row, position in enumerate(positions.tolist()):
            logits = key.bfloat16().float()[0, head // 3, : position + 1] @ query.bfloat16().float()[0, head, position]
            expected = (logits * (0.5 if scale is None else scale)).softmax(0)
            torch.testing.assert_close(weights[head, row, : position + 1], expected)
            assert not weights[head, row, position + 1 :].any()


def test_full_attention_runs_while_weights_are_recorded(make_model: MakeModel) -> None:
    """Upper layers are scored after full attention in the lower ones, whatever is bound."""
    model = make_model("llama")
    ids = torch.randint(3, 96, (30,), generator=torch.Generator().manual_seed(1))
    states = []
    with gated_model_of(model) as gated_model:
        expected = gated_model.model.hidden_states({"input_ids": ids[None]})
        hook = model.base_model.register_forward_hook(lambda *args: states.append(args[-1].last_hidden_state))
        score_attention(gated_model, ids, torch.tensor([4]), lambda rows: next(rows)[1][:, 0, 0], "max")
        hook.remove()
    assert torch.equal(states[0], expected)


def test_bindings_are_restored_after_an_exception(make_model: MakeModel) -> None:
    def fails(rows: Rows) -> Tensor:
        raise RuntimeError("on purpose")

    with gated_model_of(make_model("llama")) as gated_model:
        functions = bound_functions(gated_model.layers)
        with pytest.raises(RuntimeError, match="on purpose"):
            score_attention(gated_model, torch.arange(3, 20), torch.tensor([4]), fails, "max")
        assert bound_functions(gated_model.layers) == functions
