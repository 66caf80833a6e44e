"""The rows of results, one per question and contender; every table and figure reads them."""

from typing import Any, Literal

from duo_id.common.documents import Data, Line, Natural, Share, Tokens

SCHEMA, VERSION = "duo_id/results", 1  # of scores and results on disk
ScoredRow = dict[str, Any]  # one contender's scores on one question, see `duo_id.evaluate.judging`
# Columns of a free text, see `Scored`.
WRITTEN = ["full_written", "along_kl", "along_correct", "agreed", "written", "own_kl", "repeated"]
THIRDS = ["first_third", "middle_third", "last_third"]  # of a long answer's pieces: the share that is right
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
    bytes: Natural | None  # of the context
    total_bytes: Natural | None = None  # the same at the end of the generated answer: context, question and answer
    turn: Natural | None = None  # number of the question in a conversation that keeps the model's answers, from 1
    pieces: Line | None = None  # of a long answer, in order: 1 where a line of the right answer is there, else 0
    full_written: Natural | None = None  # tokens that full attention wrote; this and the rest only with `write`
    along_kl: float | None = None  # KL from full attention along its text, summed over these
    along_correct: Natural | None = None  # of these, those that the contender would have written too
    agreed: Natural | None = None  # tokens before the first difference between both texts
    written: Natural | None = None  # tokens that the contender wrote
    own_kl: float | None = None  # KL from full attention along the contender's own text, summed over these
    repeated: Share | None = None  # of its runs of tokens, those that occurred before
