"""Retrieval score, against loops over the full matrix."""

from collections.abc import Callable

import pytest
import torch
from transformers import PreTrainedModel

from duo_id.common.errors import UserError
from duo_id.methods import attention_weights
from duo_id.methods.retrieval_score import retrieval_score
from tests.methods.conftest import gated_model_of, grouped, haystack, settings
from tests.support.dense import dense_attention
from tests.support.planted import planted_model, planted_sample, random_sample

MakeModel = Callable[..., PreTrainedModel]


@pytest.mark.parametrize("rows", [attention_weights.ROWS, 7])
def test_score_is_how_often_the_copied_token_is_attended_to_most(
    rows: int, reduction: str, make_model: MakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With few different tokens: any position of the right one within the needle counts, and none outside."""
    monkeypatch.setattr(attention_weights, "ROWS", rows)
    needles = [(5, 100, 30), (40, 140, 40)]
    sample = haystack(190, *needles)
    ids = sample["input_ids"]
    ids.copy_(ids % 4 + 3)
    sample["labels"] = torch.where(sample["answers"] > 0, ids, -100)
    for sharpness in (1.0, 4.0):
        model = make_model("llama")
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight.data.copy_(layer.self_attn.k_proj.weight.repeat(2, 1) * sharpness)
        with dense_attention(model) as seen:
            model(ids[None], use_cache=False)
        with gated_model_of(model) as gated_model:
            scores = retrieval_score(gated_model, sample, settings(reduction))
        total, mass = [0, 0], torch.zeros(3, 4)
        for layer in range(3):
            hits = torch.zeros(4)
            for turn, (position, asked, length) in enumerate(needles):
                for step in range(length):
                    strongest = seen.weights[layer][:, asked + step - 1].argmax(-1)
                    mass[layer] += seen.weights[layer][:, asked + step - 1, position : position + length].sum(-1) / 70
                    for head in range(4):
                        key = int(strongest[head])
                        hit = position <= key < position + length and bool(ids[key] == ids[asked + step])
                        hits[head] += hit
                        total[turn] += hit
            torch.testing.assert_close(scores[0, layer], grouped(hits / 70, 2, reduction))
            torch.testing.assert_close(scores[1, layer], grouped(mass[layer], 2, reduction))
    assert min(total) > 0, "a reference without hits would test nothing"


@pytest.mark.parametrize(("layer", "kv_head"), [(0, 1), (2, 0)])
def test_the_planted_head_copies_always(layer: int, kv_head: int, make_model: MakeModel) -> None:
    model = planted_model(make_model, layer, kv_head)
    with gated_model_of(model) as gated_model:
        scores = [retrieval_score(gated_model, planted_sample(seed, True), settings())[0] for seed in range(4)]
        halves = [retrieval_score(gated_model, planted_sample(seed, True), settings("mean"))[0] for seed in range(4)]
    assert torch.stack(scores)[:, layer, kv_head].tolist() == [1, 1, 1, 1]
    mean = torch.stack(halves).mean(0)
    assert 0.5 <= mean[layer, kv_head] <= 1, "one of its two query heads copies"


def test_samples_without_needles_are_refused(make_model: MakeModel) -> None:
    sample = random_sample(20, 1)
    sample["input_ids"][:-5] = 2
    with gated_model_of(make_model("llama")) as gated_model, pytest.raises(UserError, match="occur in their contexts"):
        retrieval_score(gated_model, sample, settings())
