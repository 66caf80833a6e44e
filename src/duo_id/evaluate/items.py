"""What an evaluation asks: contexts with questions, as tokens, and the answers that count as right."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

SPLITS = ("development", "test")  # of every task: choose and tune on the first, report the second


@dataclass(frozen=True)
class Question:
    """One question about a context.

    Either it follows the context: `prompt`, then `answer`. Or the answer is part of the context, at `place` (text whose
    tokens are predicted as they come); then `prompt` is empty and nothing is generated.

    Attributes:
        prompt: tokens after the context: the question and, where the task has one, the beginning of the answer.
        answer: tokens of the right answer, at least one; their loss, KL and accuracy are teacher-forced.
        references: what a generated answer is judged against; see the item's metric.
        depth: of the answer in the context, from 0 to 1; None without a single depth.
        place: index in the context of the answer's first token, at least 1.
    """

    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    references: tuple[str, ...] = ()
    depth: float | None = None
    place: int | None = None


@dataclass(frozen=True)
class Item:
    """One context with its questions: each answered as if it were the only one, or one after another.

    Attributes:
        task: the task's name.
        length: limit in tokens on the context with the longest question and its answer; in turns, with all of them.
        index: number of the sample among those of its task and length.
        context: tokens, including those that the tokenizer or a chat template puts in front.
        questions: at least one.
        metric: how generated answers are judged, a key of `duo_id.evaluate.metrics.METRICS`.
        max_new_tokens: limit of a generated answer; 0: nothing is generated.
        stop: a generated answer ends before this text; None: only where the model ends it.
        turns: the questions are those of one conversation, in which the model's own answers stay.
    """

    task: str
    length: int
    index: int
    context: tuple[int, ...]
    questions: tuple[Question, ...]
    metric: str = "exact"
    max_new_tokens: int = 0
    stop: str | None = "\n"
    turns: bool = False

    @cached_property
    def digest(self) -> str:
        """Hash of the whole sample."""
        return hashlib.sha256(json.dumps(self.to_json()).encode()).hexdigest()[:16]

    def to_json(self) -> dict[str, Any]:
        """Plain values; those of an item without turns have no word of them, and the digest that they always had."""
        contents = asdict(self)
        if not self.turns:
            del contents["turns"]
        return contents


def from_json(contents: dict[str, Any]) -> Item:
    """The inverse of `Item.to_json`."""
    questions = tuple(Question(**_tuples(question)) for question in contents["questions"])
    return Item(**_tuples(contents) | {"questions": questions})


def _tuples(contents: dict[str, Any]) -> dict[str, Any]:
    return {
        key: tuple(value) if isinstance(value, Sequence) and not isinstance(value, str) else value
        for key, value in contents.items()
    }
