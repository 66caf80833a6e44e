"""The rows of results: one for each question, contender and measure; every table and figure reads them."""

from typing import Any, Literal

from duo_id.common.documents import Data, Line, Natural, Share, Tokens

SCHEMA, VERSION = "duo_id/results", 1  # of scores and results on disk
ScoredRow = dict[str, Any]  # what is known of one answer of one contender, see `duo_id.evaluate.judging`
SAMPLE = ["task", "length", "index"]  # columns of a row that name a context, which its questions share
QUESTION = [*SAMPLE, "question"]


class Scored(Data):
    """What was scored of one answer of one contender, as results on disk have it; what was not measured is None."""

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
