"""How well a model answers a sample: loss, token accuracy and exact answers, all teacher-forced."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from duo_id.data.samples import split_batch
from duo_id.models.language_model import LanguageModel


@dataclass(frozen=True)
class Score:
    """Sums over the answers of some samples; adding two pools them.

    Attributes:
        loss: summed negative log-likelihood of the answer tokens, in nats.
        correct: how many answer tokens are the model's first choice.
        tokens: how many answer tokens there are.
        exact: how many answers have every token right, which is when greedy decoding would give them.
        answers: how many answers there are.
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
    """Score the model, doing what is bound to its attention layers at present, on one sample.

    Processes that share a sample's tokens must all call it, and get the same.

    Args:
        model: the language model.
        sample: `input_ids` (tokens,) and `answers` (tokens,): 0, or k for the tokens of the k-th answer.
    """
    ranks, device = model.ranks, model.model.device
    batch: dict[str, Any] = {key: sample[key].to(device)[None] for key in ("input_ids", "answers")}
    asked = batch["answers"][batch["answers"] > 0]  # of all processes
    if ranks.group is not None:
        batch = split_batch(batch, ranks.part, ranks.sequence)
    positions = batch["answers"].flatten().nonzero()[:, 0]
    logits = model.predictions(batch, positions).float()
    targets, owners = (batch[key].flatten()[positions] for key in ("input_ids", "answers"))
    loss = ranks.group_sum(torch.nn.functional.cross_entropy(logits, targets, reduction="sum"))
    wrong = torch.zeros(int(asked.max()) + 1, dtype=torch.int64, device=device)  # tokens of each answer
    wrong = ranks.group_sum(wrong.index_add_(0, owners, (logits.argmax(-1) != targets).long()))
    answers = asked.unique()
    exact = int((wrong[answers] == 0).sum())
    return Score(float(loss), len(asked) - int(wrong.sum()), len(asked), exact, len(answers))


def total(scores: Iterable[Score]) -> Score:
    """The pooled score."""
    return sum(scores, Score())
