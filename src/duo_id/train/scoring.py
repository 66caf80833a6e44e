"""How well a model answers a sample: loss, token accuracy and exact answers, all teacher-forced."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from duo_id.data.samples import split_batch
from duo_id.models.language_model import LanguageModel
from duo_id.step.chunks import ELEMENTS


@dataclass(frozen=True)
class Score:
    """Sums over the answers of some samples; adding two pools them.

    Attributes:
        loss: summed negative log-likelihood of the answer tokens, in nats.
        correct: number of answer tokens that are the model's first choice.
        tokens: number of answer tokens.
        exact: number of answers with every token right, as greedy decoding would then give them.
        answers: number of answers.
    """

    loss: float = 0.0
    correct: int = 0
    tokens: int = 0
    exact: int = 0
    answers: int = 0

    def __add__(self, other: "Score") -> "Score":
        """Pool two scores."""
        return Score(*(getattr(self, key) + getattr(other, key) for key in self.__dataclass_fields__))

    @property
    def answer_loss(self) -> float:
        """Mean loss of an answer token, in nats."""
        return self.loss / self.tokens

    @property
    def token_accuracy(self) -> float:
        """Fraction of answer tokens that are the model's first choice."""
        return self.correct / self.tokens

    @property
    def exact_answers(self) -> float:
        """Fraction of answers with every token right."""
        return self.exact / self.answers


@torch.no_grad()
def score(model: LanguageModel, sample: Mapping[str, Any]) -> Score:
    """Score the model on one sample, under whatever functions are bound to its attention layers.

    Processes that share a sample's tokens must all call it; all get the same score.

    Args:
        model: the language model.
        sample: `input_ids` (tokens,) and `answers` (tokens,): 0, or k for the tokens of the k-th answer.
    """
    ranks, device = model.ranks, model.model.device
    batch: dict[str, Any] = {key: sample[key].to(device)[None] for key in ("input_ids", "answers")}
    answer_ids = batch["answers"][batch["answers"] > 0]  # of all processes
    if ranks.group is not None:
        batch = split_batch(batch, ranks.part, ranks.sequence)
    positions = batch["answers"].flatten().nonzero()[:, 0]
    states = model.predicting(model.hidden_states(batch), positions)
    targets, token_answers = (batch[key].flatten()[positions] for key in ("input_ids", "answers"))
    loss = torch.zeros((), device=device)
    is_wrong = torch.zeros(len(targets), dtype=torch.int64, device=device)
    rows = max(1, ELEMENTS // model.vocabulary)
    for start in range(0, max(len(targets), 1), rows):  # without targets too: the head's shards are gathered by all
        part = slice(start, start + rows)
        logits = model.logits(states[part]).float()
        loss += torch.nn.functional.cross_entropy(logits, targets[part], reduction="sum")
        is_wrong[part] = (logits.argmax(-1) != targets[part]).long()
    loss = ranks.group_sum(loss)
    wrong = torch.zeros(int(answer_ids.max()) + 1, dtype=torch.int64, device=device)  # tokens of each answer
    wrong = ranks.group_sum(wrong.index_add_(0, token_answers, is_wrong))
    answers = answer_ids.unique()
    exact = int((wrong[answers] == 0).sum())
    return Score(float(loss), len(answer_ids) - int(wrong.sum()), len(answer_ids), exact, len(answers))


def total(scores: Iterable[Score]) -> Score:
    """The pooled score."""
    return sum(scores, Score())
