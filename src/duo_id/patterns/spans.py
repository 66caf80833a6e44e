"""How far each head sees: the decision for deployment when heads need windows of different sizes."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import Tensor

from duo_id.common.documents import FIRST, MOST_TOKENS, Data, Natural, Tokens, checked, excerpt, read_object
from duo_id.common.errors import UserError, naming_extras
from duo_id.common.files import write_text
from duo_id.common.integrity import sealed
from duo_id.patterns import fields
from duo_id.patterns.cells import Cells
from duo_id.patterns.fields import ALL as ALL
from duo_id.patterns.tables import json_text

SCHEMA, VERSION = "duo_id/spans", 1


def kept_tokens(spans: Tensor, sink_size: int, length: int) -> Tensor:
    """The tokens, int64 of any shape, that heads with these spans keep of a context of `length` tokens."""
    return torch.where(spans == ALL, length, (spans.long() + sink_size).clamp(max=length))


class Contents(Data):
    """The contents of a file of spans, besides its schema and version."""

    layers: Natural
    kv_heads: Natural
    sink_size: Tokens
    gated_layers: Annotated[list[Natural], FIRST]
    spans: Annotated[list[Annotated[list[int], FIRST]], FIRST]


@dataclass(frozen=True, eq=False, repr=False)
class HeadSpans:
    """The attention span of each KV head: the number of latest tokens that it sees beside the sink.

    A `HeadMask` is the case of two values: all tokens, or one window.

    Attributes:
        spans: int32 CPU tensor (layers, KV heads): latest tokens, including the current one, that a head sees; -1 = all
            of them. Rows of layers without gates are -1.
        sink_size: first tokens that every head sees.
        gated_layers: the layers that the spans cover, ascending; None at construction means all. Other layers keep
            their own attention and do not count in a budget.
    """

    spans: Tensor
    sink_size: int
    gated_layers: tuple[int, ...] = None  # type: ignore[assignment]

    def __post_init__(self) -> None:
        """Copy the spans and check all fields."""
        spans = fields.numbers("spans", self.spans).detach()
        if spans.is_floating_point() or spans.dtype == torch.bool:
            raise UserError(f"attention spans are whole numbers of tokens, not {spans.dtype}")
        spans = spans.to("cpu", torch.int64, copy=True)
        fields.set_checked_fields(self, "spans", spans, windows={"sink_size": 0}, ungated=ALL)
        wrong = ((self.spans != ALL) & ((self.spans < 1) | (self.spans > MOST_TOKENS))).nonzero().tolist()
        if wrong:
            layer, head = wrong[0]
            raise UserError(
                f"the span of layer {layer}, KV head {head} is {self.spans[layer, head].item()}: it must be from 1 (a "
                f"token sees itself) to {MOST_TOKENS}, or -1 for all tokens"
            )
        object.__setattr__(self, "spans", self.spans.to(torch.int32))

    @property
    def retrieval(self) -> Tensor:
        """Whether each head sees all tokens, bool (layers, KV heads)."""
        return self.spans == ALL

    @classmethod
    def from_pretrained(cls, path: str | Path) -> "HeadSpans":
        """Read spans from a file that `save` wrote.

        Raises:
            UserError: it cannot be read, holds something else or is damaged; the message names the file.
        """
        return cls.from_contents(read_object(path), path)

    @classmethod
    def from_contents(cls, contents: dict[str, Any], path: str | Path) -> "HeadSpans":
        """The spans in the parsed contents of a file; `path` is for messages.

        Raises:
            UserError: see `from_pretrained`.
        """
        schema, version = contents.get("schema"), contents.get("version")
        if schema != SCHEMA:
            raise UserError(f"{path} holds no attention spans: its schema is {excerpt(schema)}, not {SCHEMA!r}")
        if version != VERSION:
            raise UserError(
                f"{path} has version {excerpt(version)} of its schema, but this duo_id reads version {VERSION}"
            )
        read = checked(Contents, contents, path)
        if len(read.spans) != read.layers or any(len(row) != read.kv_heads for row in read.spans):
            raise UserError(f"{path}: spans are not those of {read.layers} layers x {read.kv_heads} KV heads")
        try:
            return cls(torch.tensor(read.spans), read.sink_size, tuple(read.gated_layers))
        except UserError as error:
            raise UserError(f"{path}: {error}") from None

    def save(self, path: str | Path) -> None:
        """Write the spans to a JSON file, whole or not at all."""
        write_text(path, self.as_json())

    def as_json(self) -> str:
        """The text of the file that `save` writes."""
        layers, kv_heads = self.spans.shape
        contents = {
            "schema": SCHEMA,
            "version": VERSION,
            "layers": layers,
            "kv_heads": kv_heads,
            "sink_size": self.sink_size,
            "gated_layers": list(self.gated_layers),
            "spans": self.spans.tolist(),
        }
        return json_text(sealed(contents))

    def cache_share(self, length: int) -> float:
        """The share of the full cache's bytes that the gated layers keep of a context of `length` tokens.

        Raises:
            UserError: `length` is no number of tokens, or no context is that long.
        """
        fields.check_length(length)
        kept = kept_tokens(self.spans[list(self.gated_layers)], self.sink_size, length)
        return int(kept.sum()) / (kept.numel() * length)

    def cells(self) -> Cells:
        """The spans as figures draw them: those of all tokens lie beyond the longest other."""
        gated = self.spans[list(self.gated_layers)]
        limited = gated[gated != ALL].tolist() or [1]
        low, high = min(limited), max(limited)
        limits = (float(low), high * (high / low) ** 0.15) if low < high else (low / 2, 2.0 * high)  # room for "all"
        values = torch.where(self.spans == ALL, 2 * limits[1], self.spans.double()).numpy()
        return Cells(values, self.gated_layers, "span (tokens beside the sink)", limits, spans=True)

    @naming_extras("plot")
    def plot(self, title: str | None = None) -> Any:
        """Heatmap of the spans, layers x KV heads, on a logarithmic scale; "all" has a colour of its own.

        How many heads have which span: `duo_id.patterns.plots.plot_spans`.

        Returns:
            a `matplotlib.figure.Figure`, which notebooks show.
        """
        from duo_id.patterns.heatmap import plot_heads  # matplotlib, which nothing else here needs

        return plot_heads(self.cells(), title=title)

    @naming_extras("the heatmap")
    def _repr_html_(self) -> str:
        """What notebooks show: the heatmap, and below it how many heads have which span."""
        from duo_id.common.figures import as_html  # as above

        return as_html(self.plot(), repr(self))

    def check_fits(self, layers: int, kv_heads: int, model_name: str) -> None:
        """Raise a `UserError` unless the model `model_name` has this many layers and KV heads."""
        fields.check_fits("mask of spans", self.spans, layers, kv_heads, model_name)

    def __eq__(self, other: object) -> bool:
        """Whether every head has the same span and the same sink."""
        return isinstance(other, HeadSpans) and (self.spans.tolist(), self.sink_size, self.gated_layers) == (
            other.spans.tolist(),
            other.sink_size,
            other.gated_layers,
        )

    def __repr__(self) -> str:
        """Shape and how many heads have which span."""
        values, counts = self.spans[list(self.gated_layers)].unique(return_counts=True)
        named = [
            f"{count} x {'all' if value == ALL else value}"
            for value, count in zip(values.tolist(), counts.tolist(), strict=True)
        ]
        layers, kv_heads = self.spans.shape
        return f"HeadSpans({layers} layers x {kv_heads} KV heads, sink_size={self.sink_size}, {', '.join(named)})"
