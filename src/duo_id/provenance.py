"""What of a pattern's provenance anything looks at, as a schema; all else in it is kept, and looked at by nobody."""

from typing import Any

from duo_id.documents import Count, Data, Line, Positive, Share


class Model(Data):
    """The model that a pattern was found on, as it was loaded."""

    name: Line | None = None
    id: Line | None = None
    revision: Line | None = None
    source: Line | None = None
    dtype: Line | None = None
    layers: Count | None = None
    gated_layers: Count | None = None
    kv_heads: Count | None = None
    heads: Count | None = None


class FoundOn(Data):
    """The settings of the samples."""

    task: Line | None = None
    mixture: dict[str, Positive] | None = None


class FoundBy(Data):
    """The settings of the method."""

    name: Line = "duo"
    gate: Line | None = None


class Settings(Data):
    """Of the run; `model` is checked where it is taken to load one, by `duo_id.foreign.model_of`."""

    model: Any = None
    data: FoundOn | None = None
    method: FoundBy | None = None


class Provenance(Data):
    """Of a pattern, and of the summary of the run that found it."""

    model: Model | None = None
    settings: Settings | None = None
    versions: dict[str, Line | None] | None = None
    seed: Count | None = None
    seconds: Positive | None = None
    budget: Share | None = None
