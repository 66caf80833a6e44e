"""The rows of results, one per question and contender; every table and figure reads them."""

from typing import Any, Literal

from duo_id.common.documents import Data, Line, Natural, Share, Tokens

SCHEMA, VERSION = "duo_id/results", 1  # of scores and results on disk
ScoredRow = dict[str, Any]  # one contender's scores on one question, see `duo_id.evaluate.judging`
SAMPLE = ["task", "length", "index"]  # columns that identify a context, shared by its questions
QUESTION = [*SAMPLE, "question"]


class Scored(Data):
    """One contender's scores on one question, as saved on disk; None where something was not measured."""

    task: Line
    length: Tokens
    index: Natural
    question: Natural
    depth: Share | None
    kind: Literal["full", "pattern", "baseline", "eviction"]
    heads: Line
    sparsity: Share
    seed: Natural | None
    loss: float
    kl: float | None
    tokens: Natural
    correct: Natural
    score: float | None
    exact: bool | None
    text: str | None
    bytes: Natural | None
