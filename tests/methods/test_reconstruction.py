"""Reconstruction score, against loops over the full matrix."""

from collections.abc import Callable

import pytest
import torch
from transformers import PreTrainedModel

from duo_id.attention.window import Window
from duo_id.common.errors import UserError
from duo_id.data.haystack import tokenize
from duo_id.methods.reconstruction import reconstruction
from duo_id.methods.replay import REQUEST
from tests.methods.conftest import WINDOW, gated_model_of, grouped, one_word_tokenizer, settings
from tests.support.dense import dense_attention
from tests.support.planted import random_sample

ASKED = len(tokenize(one_word_tokenizer(), REQUEST))


@pytest.mark.parametrize("window", [WINDOW, Window(5, 35)])  # the second still sees some while they are repeated
@pytest.mark.parametrize(("tokens", "limit", "kept"), [(40, 512, 40), (70, 512, 70), (60, 100, (100 - ASKED) // 2)])
def test_score_is_the_most_that_lost_tokens_get_while_the_text_is_repeated(
    tokens: int, limit: int, kept: int, window: Window, reduction: str, make_model: Callable[..., PreTrainedModel]
) -> None:
    model, sample = make_model("llama", max_position_embeddings=limit), random_sample(tokens, 1)
    text = sample["input_ids"][:kept]
    ids = torch.cat([text, torch.full((ASKED,), 12), text])
    assert len(ids) <= limit
    with dense_attention(model) as seen:
        model(ids[None], use_cache=False)
    with gated_model_of(model, window) as gated_model:
        scores = reconstruction(gated_model, sample, settings(reduction))
    for layer in range(3):
        highest = torch.zeros(4, kept)
        for position in range(kept + ASKED, len(ids)):
            query = position - 1
            for key in range(kept):
                if key >= window.sink_size and query - key >= window.recent_size:
                    highest[:, key] = torch.maximum(highest[:, key], seen.weights[layer][:, query, key])
        expected = highest[:, window.sink_size :].mean(-1)
        torch.testing.assert_close(scores[layer], grouped(expected, 2, reduction), rtol=1e-4, atol=1e-6)
    assert scores.min() > 0


@pytest.mark.parametrize(
    ("window", "limit", "tokens"),
    [(Window(3, 40), 512, 40 - ASKED), (Window(30, 8), 512, 30), (Window(0, 8), 5, 60), (Window(0, 1), 3, 60)],
)
def test_texts_that_no_window_loses_are_refused(
    window: Window, limit: int, tokens: int, make_model: Callable[..., PreTrainedModel]
) -> None:
    model = make_model("llama", max_position_embeddings=limit)
    with (
        gated_model_of(model, window) as gated_model,
        pytest.raises(UserError, match=r"data\.length_min.*recent_size") as error,
    ):
        reconstruction(gated_model, random_sample(tokens, 1), settings())
    assert "\n" not in str(error.value)


def test_one_token_more_is_enough(make_model: Callable[..., PreTrainedModel]) -> None:
    with gated_model_of(make_model("llama"), Window(0, 40)) as gated_model:
        assert reconstruction(gated_model, random_sample(41 - ASKED, 1), settings()).min() > 0
