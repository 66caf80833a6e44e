"""Scores that are means over samples find the planted head."""

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import PreTrainedModel

from duo_id.common.errors import UserError
from duo_id.methods.attention_profile import attention_profile
from duo_id.methods.query_score import query_score
from duo_id.methods.reconstruction import reconstruction
from duo_id.methods.replay_gradient import replay_gradient
from duo_id.methods.retrieval_score import retrieval_score
from duo_id.methods.saliency import saliency
from duo_id.methods.sample_scores import TIE_RANGE, Score, break_ties, mean_scores
from duo_id.methods.settings import AttentionSettings, SaliencySettings
from tests.methods.conftest import gated_model_of, haystack
from tests.support.planted import HEADS, assert_first, planted_model, planted_sample, random_sample

MakeModel = Callable[..., PreTrainedModel]
CONSOLE = Console(file=io.StringIO())
WINDOW: dict[str, Any] = {"sink_size": 3, "recent_size": 8}
SCORES: dict[str, Score] = {
    score.__name__: score
    for score in (attention_profile, query_score, reconstruction, replay_gradient, retrieval_score, saliency)
}


@pytest.mark.parametrize(("layer", "kv_head"), HEADS)
@pytest.mark.parametrize("reduction", ["max", "mean"])
@pytest.mark.parametrize("name", [name for name in SCORES if name != "saliency"])
def test_scores_from_attention_rank_the_planted_head_first(
    name: str, reduction: str, layer: int, kv_head: int, make_model: MakeModel
) -> None:
    with gated_model_of(planted_model(make_model, layer, kv_head)) as gated_model:
        samples = [planted_sample(seed, answered=True) for seed in range(6)]
        settings = AttentionSettings(name, **WINDOW, reduction=reduction)
        assert_first(mean_scores(SCORES[settings.name], gated_model, samples, settings, CONSOLE), layer, kv_head)


@pytest.mark.parametrize(("layer", "kv_head"), HEADS)
@pytest.mark.parametrize(
    "changes",
    [
        {"objective": "kl", "at": [0.75, 0.5]},
        {"objective": "hidden_l2", "at": [0.5]},
        {"objective": "layer_l2", "at": [0.9]},
        {"kind": "fisher", "at": [1.0]},
    ],
    ids=str,
)
def test_saliency_ranks_the_planted_head_first(
    changes: dict[str, Any], layer: int, kv_head: int, make_model: MakeModel
) -> None:
    answered = changes.get("objective", "kl") == "kl"  # what QUERY predicts, or QUERY's own hidden state
    with gated_model_of(planted_model(make_model, layer, kv_head)) as gated_model:
        samples = [planted_sample(seed, answered) for seed in range(6)]
        scores = mean_scores(saliency, gated_model, samples, SaliencySettings("saliency", **WINDOW, **changes), CONSOLE)
    assert_first(scores, layer, kv_head)


def test_the_mean_over_samples(make_model: MakeModel) -> None:
    settings = AttentionSettings("attention_profile", **WINDOW)
    with gated_model_of(make_model("llama")) as gated_model:
        samples = [random_sample(40, seed) for seed in range(3)]
        alone = [SCORES["attention_profile"](gated_model, sample, settings) for sample in samples]
        torch.testing.assert_close(
            mean_scores(SCORES[settings.name], gated_model, samples, settings, CONSOLE), torch.stack(alone).mean(0)
        )


def test_heads_that_copy_equally_often_are_ordered_by_their_attention_to_the_needle(make_model: MakeModel) -> None:
    settings = AttentionSettings("retrieval_score", **WINDOW)
    with gated_model_of(make_model("llama")) as gated_model:
        samples = [haystack(60, (5, 40, 3), seed=seed) for seed in range(4)]
        alone = torch.stack([SCORES["retrieval_score"](gated_model, sample, settings) for sample in samples])
        copied, attention = alone.mean(0).flatten(1)
        scores = mean_scores(SCORES[settings.name], gated_model, samples, settings, CONSOLE).flatten()
    assert len(copied.unique()) < len(copied), "the test needs ties"
    assert len(scores.unique()) == len(scores)
    pairs = list(zip(copied.round(decimals=6).tolist(), attention.tolist(), strict=True))
    assert scores.argsort().tolist() == sorted(range(len(pairs)), key=lambda head: pairs[head])
    assert ((scores >= copied - 1e-6) & (scores <= copied + TIE_RANGE + 1e-6)).all()


@pytest.mark.parametrize("seed", range(20))
def test_tie_breaks_order_ties_and_nothing_else(seed: int) -> None:
    """Against Python's sort of pairs: scores of few values, some of them neighbours in float32, negative or large."""
    random = torch.Generator().manual_seed(seed)
    near = torch.tensor([0.3, 0.5, -2.0, 1e4])
    values = torch.cat([torch.rand(4, generator=random), torch.zeros(1), near, near.nextafter(torch.tensor(torch.inf))])
    scores = values[torch.randint(len(values), (30, 3), generator=random)]
    tie_breaks = torch.rand(30, 3, generator=random, dtype=torch.float64)
    tie_breaks.view(-1)[:2] = torch.tensor([0.0, 1.0])
    settled = break_ties(scores.double(), tie_breaks)
    assert (settled.shape, settled.dtype) == (scores.shape, torch.float32)
    assert ((settled >= scores) & (settled.double() <= scores.double() + 1.001 * TIE_RANGE)).all()
    scores_flat, settled_flat, ranks = scores.flatten(), settled.flatten(), tie_breaks.flatten()
    lower = scores_flat[:, None] < scores_flat
    assert (settled_flat[:, None] < settled_flat)[lower].all(), "no order of different scores changes"
    equal = (scores_flat[:, None] == scores_flat) & (ranks[:, None] < ranks)
    assert (settled_flat[:, None] <= settled_flat)[equal].all()
    zero = torch.isin(scores_flat, torch.zeros(1))
    assert settled_flat[zero].argsort().tolist() == ranks[zero].argsort().tolist(), (
        "where there is room, none stay equal"
    )


@pytest.mark.parametrize("name", ["retrieval_score", "query_score"])
def test_samples_without_their_answers_in_context_do_not_count(name: str, make_model: MakeModel) -> None:
    settings = AttentionSettings(name, **WINDOW)
    with gated_model_of(planted_model(make_model, 1, 0)) as gated_model:
        held, text = planted_sample(0, answered=True), random_sample(60, 1, scored=20)
        alone = mean_scores(SCORES[settings.name], gated_model, [held], settings, CONSOLE)
        torch.testing.assert_close(
            mean_scores(SCORES[settings.name], gated_model, [text, held, text], settings, CONSOLE), alone
        )
        with pytest.raises(UserError, match=f"^method={name} needs samples .*: choose data=passkey"):
            mean_scores(SCORES[settings.name], gated_model, [text], settings, CONSOLE)
