"""What of a pattern's provenance anything looks at, as a schema; all else in it is kept, and only shown."""

from typing import Annotated, Any

from duo_id.common.documents import FIRST, Data, Line, Natural, NonNegative, Share


class Model(Data):
    """The model that a pattern was found on, as it was loaded."""

    name: Line | None = None
    id: Line | None = None
    revision: Line | None = None
    source: Line | None = None
    dtype: Line | None = None
    layers: Natural | None = None
    gated_layers: Natural | None = None
    kv_heads: Natural | None = None
    heads: Natural | None = None


class FoundOn(Data):
    """The settings of the samples."""

    task: Line | None = None
    mixture: dict[str, NonNegative] | None = None


class FoundBy(Data):
    """The settings of the method."""

    name: Line = "duo"
    gate: Line | None = None


class Settings(Data):
    """Of the run; `model` is checked where it is taken to load one, by `duo_id.common.foreign.model_of`."""

    model: Any = None
    data: FoundOn | None = None
    method: FoundBy | None = None


class Told(Data):
    """By patterns, and by the summary of the run that found one."""

    settings: Settings | None = None
    versions: dict[str, Line | None] | None = None
    seed: Natural | None = None
    budget: Share | None = None


class Provenance(Told):
    """Of a pattern."""

    model: Model | None = None
    seconds: NonNegative | None = None


class Result(Data):
    """What a mask scored at the end of a run."""

    heads: Line
    sparsity: Share
    seed: Natural | None = None  # of random masks
    answer_loss: float
    token_accuracy: float | None = None
    exact_answers: float | None = None
    loss: float | None = None  # the sums that the means are of
    correct: Natural | None = None
    tokens: Natural | None = None
    exact: Natural | None = None
    answers: Natural | None = None


class Evidence(Told):
    """A summary.json as a model card takes it."""

    results: Annotated[list[Result], FIRST] | None = None


class Summary(Evidence):
    """A summary.json as reports take it."""

    model: Model
    seconds: dict[str, NonNegative] | NonNegative | None = None  # of each part; of all in early versions
    steps: Natural | None = None
    mean_gate: float = 0.0
    validation_loss: float | None = None


class Shared(Evidence):
    """A summary.json as it is published: no more than this. Its settings stand in the pattern's provenance."""

    model: Model | None = None
    seconds: dict[str, NonNegative] | NonNegative | None = None
    steps: Natural | None = None
    mean_gate: float | None = None
    validation_loss: float | None = None
