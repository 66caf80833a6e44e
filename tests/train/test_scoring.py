"""Scores of answers, worked out by hand against a model that says what it is told to say."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from duo_id.distributed.ranks import Ranks
from duo_id.models.language_model import LanguageModel
from duo_id.models.loading import byte_tokenizer
from duo_id.train import scoring
from duo_id.train.scoring import Score, score, total
from tests.support.tensors import LargestTensor
from tests.support.tiny import tiny_model

VOCABULARY = 4


class Scripted:
    """Stands for a language model: its state at each position is a row of a table of next-token logits."""

    ranks, vocabulary = Ranks(), VOCABULARY
    logits = staticmethod(Tensor.clone)

    def __init__(self, logits: Tensor) -> None:
        self.table = logits
        self.model = self
        self.device = torch.device("cpu")

    def hidden_states(self, batch: dict[str, Any]) -> Tensor:
        assert batch["input_ids"].shape == (1, len(self.table))
        return self.table[None]

    def predicting(self, states: Tensor, scored: Tensor) -> Tensor:
        return states[0, scored - 1]


def certain(*tokens: int) -> Tensor:
    """Logits that give the named token at each position probability 1/2 and share the rest."""
    other = 0.5 / (VOCABULARY - 1)
    table = torch.full((len(tokens), VOCABULARY), math.log(other))
    table[torch.arange(len(tokens)), torch.tensor(tokens)] = math.log(0.5)
    return table


def test_answers_are_predicted_one_token_ahead() -> None:
    sample = {
        "input_ids": torch.tensor([3, 1, 2, 0, 1, 3, 2]),
        "answers": torch.tensor([0, 1, 1, 0, 2, 2, 2]),
    }
    # What is said at position i is about token i + 1: right for 1, 2 (first answer) and 1, 3, but not the last 2.
    says = certain(1, 2, 0, 1, 3, 0, 0)
    result = score(Scripted(says), sample)
    assert (result.correct, result.tokens, result.exact, result.answers) == (4, 5, 1, 2)
    assert result.loss == pytest.approx(4 * math.log(2) + math.log(6))
    assert result.answer_loss == pytest.approx((4 * math.log(2) + math.log(6)) / 5)
    assert result.token_accuracy == 0.8
    assert result.exact_answers == 0.5


def test_tokens_outside_answers_do_not_count() -> None:
    ids, answers = torch.tensor([0, 1, 2, 3]), torch.tensor([0, 0, 1, 0])
    result = score(Scripted(certain(3, 2, 0, 0)), {"input_ids": ids, "answers": answers})
    assert result == Score(pytest.approx(math.log(2)), 1, 1, 1, 1)


def test_pooling_weighs_tokens_and_answers_not_samples() -> None:
    pooled = total([Score(6.0, 1, 2, 0, 1), Score(2.0, 6, 6, 3, 3)])
    assert pooled == Score(8.0, 7, 8, 3, 4)
    assert (pooled.answer_loss, pooled.token_accuracy, pooled.exact_answers) == (1.0, 0.875, 0.75)
    assert total([]) == Score()


def test_score_of_a_real_model_is_its_cross_entropy() -> None:
    model = LanguageModel(tiny_model("llama"), byte_tokenizer(), "tiny", "tiny", None, "random")
    ids = torch.randint(3, 96, (20,), generator=torch.Generator().manual_seed(0))
    answers = torch.zeros(20, dtype=torch.long)
    answers[12:15], answers[17:] = 1, 2
    logits = model.model(ids[None]).logits[0].log_softmax(-1)
    expected = -sum(logits[at - 1, ids[at]] for at in (12, 13, 14, 17, 18, 19))
    result = score(model, {"input_ids": ids, "answers": answers})
    assert result.loss == pytest.approx(expected.item(), rel=1e-5)
    assert (result.tokens, result.answers) == (6, 2)


def test_logits_of_a_few_tokens_at_a_time_score_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    words = 2000  # so many that anything else is small
    model = LanguageModel(
        tiny_model("llama", vocab_size=words, tie_word_embeddings=False),
        byte_tokenizer(),
        "tiny",
        "tiny",
        None,
        "random",
    )
    ids = torch.randint(3, words, (40,), generator=torch.Generator().manual_seed(0))
    answers = torch.arange(40) // 10
    ids[15:25] = model.model(ids[None]).logits[0, 14:24].argmax(-1)  # some are right
    results, largest = {}, {}
    for tokens in (1, 4, 30, 100):
        monkeypatch.setattr(scoring, "ELEMENTS", tokens * words)
        with LargestTensor(model.model) as seen:
            results[tokens] = score(model, {"input_ids": ids, "answers": answers})
        largest[tokens] = seen.elements // words
    assert 0 < results[1].correct < results[1].tokens == 30
    for result in results.values():
        assert result == replace(results[1], loss=pytest.approx(results[1].loss, rel=1e-6))
    assert largest[4] == 4
    assert largest[30] == largest[100] == 30
    assert largest[1] <= 3, "attention's tensors are larger than the logits of one token"
