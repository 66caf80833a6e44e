"""Query-focused score, against loops over the full matrix."""

from collections.abc import Callable

import pytest
import torch
from transformers import PreTrainedModel

from duo_id.methods.query_score import LEAD_TOKENS, query_score
from tests.methods.conftest import gated_model_of, grouped, haystack, settings
from tests.support.dense import dense_attention

CASES = {
    "one": [((30, 80, 4), range(64, 80), range(14, 34))],
    "at the start": [((2, 80, 4), range(64, 80), range(6))],
    "behind each other": [  # the second question begins where the first answer ends
        ((30, 80, 4), range(64, 80), range(14, 34)),
        ((40, 90, 3), range(84, 90), range(24, 43)),
    ],
    "far apart": [((5, 50, 2), range(34, 50), range(7)), ((20, 80, 3), range(64, 80), range(4, 23))],
    "near": [((60, 70, 3), range(63, 70), range(44, 63))],  # tokens up to the needle ask for nothing
    "at once": [((30, 80, 4), range(64, 80), range(14, 34)), ((50, 84, 3), range(0), range(0))],
    "nowhere": [((77, 80, 3), range(0), range(0))],
    "many": [((i, 60 + 18 * i, 1), range(44 + 18 * i, 60 + 18 * i), range(i + 1)) for i in range(6)],  # over 64 rows
}


@pytest.mark.parametrize("case", CASES)
def test_score_is_the_mass_from_the_question_to_the_answers_sentence(
    case: str, reduction: str, make_model: Callable[..., PreTrainedModel]
) -> None:
    assert LEAD_TOKENS == 16
    model, sample = make_model("llama"), haystack(160, *(needle for needle, _, _ in CASES[case]))
    ids = sample["input_ids"]
    if case == "many":
        ids[:60], ids[60:] = torch.arange(3, 63), torch.where(sample["answers"][60:] > 0, ids[60:], 80)
        ids[[60 + 18 * i for i in range(6)]] = ids[:6].clone()
    with dense_attention(model) as seen:
        model(ids[None], use_cache=False)
    with gated_model_of(model) as gated_model:
        scores = query_score(gated_model, sample, settings(reduction))
    for layer in range(3):
        total, queries_seen = torch.zeros(4), 0
        for _, queries, keys in CASES[case]:
            for query in queries:
                queries_seen += 1
                for key in keys:
                    total += seen.weights[layer][:, query, key]
        torch.testing.assert_close(
            scores[layer], grouped(total / max(queries_seen, 1), 2, reduction), rtol=1e-4, atol=1e-6
        )
