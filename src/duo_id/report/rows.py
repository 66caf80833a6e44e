"""The rows of results, one per question and contender; every table and figure reads them."""

from typing import Any, Literal

from duo_id.common.documents import Data, Line, Natural, Share, Tokens

SCHEMA, VERSION = "duo_id/results", 1  # of scores and results on disk
ScoredRow = dict[str, Any]  # one contender's scores on one question, see `duo_id.evaluate.judging`
SAMPLE = ["task", "length", "index"]  # columns that identify a context, shared by its questions
QUESTION = [*SAMPLE, "question"]
KINDS = ("full", "pattern", "spans", "baseline", "eviction")  # of contenders, in the order of tables
ASKED = ["kind", "heads", "sparsity", "seed", "cache"]  # columns that identify a contender
OF_PATTERNS = ("pattern", "spans")  # kinds whose contenders are named after a head pattern: its masks, and its spans


class Scored(Data):
    """One contender's scores on one question, as saved on disk; None where something was not measured."""

    task: Line
    length: Tokens
    index: Natural
    question: Natural
    depth: Share | None
    kind: Literal["full", "pattern", "spans", "baseline", "eviction"]
    heads: Line
    sparsity: Share | None  # asked of the contender; None where a share of the cache is asked
    cache: Share | None = None  # likewise
    seed: Natural | None
    loss: float
    kl: float | None
    tokens: Natural
    correct: Natural
    score: float | None
    exact: bool | None
    text: str | None
    bytes: Natural | None
