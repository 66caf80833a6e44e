"""Long prompts in chunks, in models where chunks are not exact and where positions do not begin at 0."""

from typing import Any

import pytest
import torch

from duo_id import dual_cache, duo_attention, prefill
from duo_id.attention.interface import attached
from duo_id.common.compat import cache_argument
from duo_id.common.errors import UserError
from tests.deploy.cases import build, check_equal, random_ids
from tests.support import families


def test_a_model_that_loses_its_state_between_chunks_is_refused() -> None:
    """Whole, or token by token after a past, it is right."""
    model, ids = families.tiny_model("jamba"), random_ids(1, 40)
    with attached(model) as layers:
        mask = families.mask_of(model, layers)
    with duo_attention(model, mask), torch.no_grad():
        expected = model(ids, use_cache=False).logits
        with pytest.raises(UserError, match=r"chunk_size=20: .*lose their state"):
            prefill(model, ids, dual_cache(model), 20)
        cache = dual_cache(model)
        check_equal(prefill(model, ids[:, :30], cache, 30), expected[:, 29])
        check_equal(prefill(model, ids[:, 30:], cache, 1), expected[:, -1])


@pytest.mark.parametrize("family", ["bamba", "roberta"])
def test_positions_are_those_that_the_model_counts(family: str) -> None:
    """Read off no cache by some, and from behind an entry for padding by others; padded batches too."""
    model, ids = families.tiny_model(family), random_ids(2, 40)
    with attached(model) as layers:
        mask = families.mask_of(model, layers)
    real = torch.ones_like(ids)
    real[1, :9] = 0
    with duo_attention(model, mask), torch.no_grad():
        expected = [model(ids[row : row + 1, start:], use_cache=False).logits[:, -1] for row, start in ((0, 0), (1, 9))]
        check_equal(prefill(model, ids[:1], dual_cache(model), 7), expected[0])
        if family == "roberta":
            check_equal(prefill(model, ids, dual_cache(model), 7, real), torch.cat(expected))


def test_the_check_is_for_prefill_alone_and_leaves_the_cache_as_it_is() -> None:
    model, ids = build("llama"), random_ids(1, 40)
    with attached(model) as layers:
        mask = families.mask_of(model, layers)
    with duo_attention(model, mask), torch.no_grad():
        cache = dual_cache(model)
        model(ids[:, :10], **{cache_argument(model): cache})
        found = prefill(model, ids[:, 10:], cache, 7)
        assert cache.get_seq_length() == 40
        check_equal(found, model(ids, use_cache=False).logits[:, -1])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"input_ids": [[1, 2]]}, r"^input_ids: a list is no tensor \(batch, tokens\)$"),
        ({"input_ids": torch.ones(1, 4)}, r"^input_ids are torch\.float32, not whole numbers$"),
        ({"input_ids": torch.ones(4, dtype=torch.long)}, r"^input_ids must be \(batch, tokens\), not \(4,\)$"),
        ({"chunk_size": "a"}, r"^chunk_size='a' must be a whole number of tokens$"),
        ({"chunk_size": 0}, r"^chunk_size=0 must be at least 1 token$"),
        ({"attention_mask": [[1] * 8]}, r"^attention_mask: a list is no tensor"),
        ({"attention_mask": torch.ones(8)}, r"^attention_mask must be \(batch, tokens\), not \(8,\)$"),
    ],
    ids=["list", "floats", "no batch", "text", "zero", "mask as a list", "mask without a batch"],
)
def test_what_is_no_prompt_names_the_argument(given: dict[str, Any], message: str) -> None:
    model = build("llama")
    with attached(model) as layers:
        mask = families.mask_of(model, layers)
    with duo_attention(model, mask), pytest.raises(UserError, match=message):
        prefill(model, **({"input_ids": random_ids(1, 8), "cache": dual_cache(model)} | given))
