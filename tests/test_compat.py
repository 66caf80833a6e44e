"""The names that drift between releases of transformers, on whichever release runs."""

import warnings
from collections.abc import Callable

import torch
from transformers import DynamicCache, PreTrainedModel

from duo_id.compat import cache_argument, cache_of


def test_a_cache_goes_in_and_comes_out_without_a_warning(make_model: Callable[..., PreTrainedModel]) -> None:
    model, cache = make_model("llama"), DynamicCache()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        output = model(torch.tensor([[3, 4, 5]]), use_cache=True, **{cache_argument(model): cache})
        assert cache_of(output) is cache
        assert cache_of(model(torch.tensor([[3, 4, 5]]), use_cache=False)) is None
    assert cache.get_seq_length() == 3


def test_a_forward_that_keeps_the_old_name_is_given_it() -> None:
    def forward(input_ids: object, past_key_values: object = None) -> None: ...

    assert cache_argument(forward) == "past_key_values"
    assert cache_argument(lambda input_ids, cache=None: None) == "cache"
