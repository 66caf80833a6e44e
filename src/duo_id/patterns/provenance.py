"""The fields of a pattern's provenance that code uses, as a schema; all others are kept, and only displayed."""

from typing import Annotated, Any

from duo_id.common.documents import FIRST, Data, Line, Natural, NonNegative, Share


class Model(Data):
    """The model that a pattern was found on, as loaded."""

    name: Line | None = None
    id: Line | None = None
    revision: Line | None = None
    source: Line | None = None
    dtype: Line | None = None
    weights: Line | None = None  # int8, int4, or the method that its checkpoint was quantised by
    layers: Natural | None = None
    gated_layers: Natural | None = None
    kv_heads: Natural | None = None
    heads: Natural | None = None


class SampleSettings(Data):
    """The settings of the samples."""

    task: Line | None = None
    mixture: dict[str, NonNegative] | None = None


class MethodSettings(Data):
    """The settings of the method."""

    name: Line = "duo"
    gate: Line | None = None


class Settings(Data):
    """Of the run; `model` is checked by `duo_id.common.foreign.model_of` when a model is loaded from it."""

    model: Any = None
    data: SampleSettings | None = None
    method: MethodSettings | None = None


class RunRecord(Data):
    """Common to patterns and the summary of the run that found one."""

    settings: Settings | None = None
    versions: dict[str, Line | None] | None = None
    seed: Natural | None = None
    budget: Share | None = None


class Provenance(RunRecord):
    """Of a pattern."""

    model: Model | None = None
    seconds: NonNegative | None = None


class Result(Data):
    """The evaluation of a mask at the end of a run."""

    heads: Line
    sparsity: Share
    seed: Natural | None = None  # of random masks
    answer_loss: float
    token_accuracy: float | None = None
    exact_answers: float | None = None
    loss: float | None = None  # sums behind the means
    correct: Natural | None = None
    tokens: Natural | None = None
    exact: Natural | None = None
    answers: Natural | None = None


class Evidence(RunRecord):
    """A summary.json as model cards read it."""

    results: Annotated[list[Result], FIRST] | None = None


class Summary(Evidence):
    """A summary.json as reports read it."""

    model: Model
    seconds: dict[str, NonNegative] | NonNegative | None = None  # of each part; the total in early versions
    steps: Natural | None = None
    mean_gate: float = 0.0
    validation_loss: float | None = None


class PublishedSummary(Evidence):
    """A summary.json as published: only these fields. Its settings are in the pattern's provenance."""

    model: Model | None = None
    seconds: dict[str, NonNegative] | NonNegative | None = None
    steps: Natural | None = None
    mean_gate: float | None = None
    validation_loss: float | None = None
