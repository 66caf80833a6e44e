"""Attention profile, against loops over the full matrix."""

from collections.abc import Callable

import pytest
import torch
from transformers import PreTrainedModel

from duo_id.methods.attention_profile import attention_profile
from tests.methods.conftest import WINDOW, gated_model_of, grouped, haystack, settings
from tests.support.dense import dense_attention
from tests.support.planted import random_sample


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
@pytest.mark.parametrize("scored", [1, 70])  # more than are held at the same time
def test_profile_is_the_mass_outside_the_window(
    family: str, scored: int, reduction: str, make_model: Callable[..., PreTrainedModel]
) -> None:
    model, sample = make_model(family), random_sample(90, 1, scored)
    with dense_attention(model) as seen:
        model(sample["input_ids"][None], use_cache=False)
    with gated_model_of(model) as gated_model:
        profile = attention_profile(gated_model, sample, settings(reduction))
        kv_heads = gated_model.shape[1]
    for layer in range(3):
        total = torch.zeros(4)
        for labelled in range(90 - scored, 90):
            query = labelled - 1
            for key in range(query + 1):
                if key >= WINDOW.sink_size and query - key >= WINDOW.recent_size:
                    total += seen.weights[layer][:, query, key]
        torch.testing.assert_close(profile[layer], grouped(total / scored, kv_heads, reduction), rtol=1e-4, atol=1e-6)
    assert 0 < profile.min() < profile.max() < 1


def test_labels_alone_say_which_queries(make_model: Callable[..., PreTrainedModel]) -> None:
    sample = haystack(60, (20, 40, 3))
    with gated_model_of(make_model("llama")) as gated_model:
        profile = attention_profile(gated_model, sample, settings())
        sample["answers"] = torch.zeros_like(sample["answers"])
        assert torch.equal(attention_profile(gated_model, sample, settings()), profile)
        sample["labels"][:30] = sample["input_ids"][:30]
        assert not torch.equal(attention_profile(gated_model, sample, settings()), profile)


def test_within_the_window_there_is_nothing(make_model: Callable[..., PreTrainedModel]) -> None:
    with gated_model_of(make_model("llama")) as gated_model:
        assert not attention_profile(gated_model, random_sample(8, 1, 8), settings()).any()
