"""How much each head needs the context: scores, and what was measured about its attention spans."""

import json
import math
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field
from numbers import Real
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from duo_id.common.documents import checked
from duo_id.common.errors import UserError, check, naming_extras, one_line
from duo_id.patterns import allocation, fields, files
from duo_id.patterns.cells import Cells
from duo_id.patterns.mask import HeadMask
from duo_id.patterns.needs import SpanNeeds
from duo_id.patterns.provenance import Provenance
from duo_id.patterns.spans import HeadSpans


class TieWarning(UserWarning):
    """A mask separates heads that have the same score."""


@dataclass(frozen=True, eq=False, repr=False)
class HeadPattern:
    """The result of identification: a score for each KV head, the window it applies to, and its provenance.

    Heads are ordered by score, and among equal scores by layer, then by head. They stream from the start of this order:
    of two equal heads the one in the earlier layer (then the one with the lower index) streams first, and the heads
    that stream at a lower sparsity always stream at a higher one too.

    Attributes:
        scores: float32 CPU tensor (layers, KV heads), copied at construction; higher = retrieval. Gates lie in [0, 1]
            up to rounding; other methods may use any finite scale. Rows of layers without gates are set to 1.
        sink_size: first tokens that a streaming head sees.
        recent_size: most recent tokens that a streaming head sees, including the current one.
        gated_layers: the layers whose heads were scored, ascending; None at construction means all.
        provenance: anything that JSON can hold: the model (id, revision, layers, kv_heads), method, seed, versions.
            Fields that are used have the types of `duo_id.patterns.provenance.Provenance`.
        needs: what each head loses at several attention spans, where that was measured.
    """

    scores: Tensor
    sink_size: int
    recent_size: int
    gated_layers: tuple[int, ...] = None  # type: ignore[assignment]
    provenance: dict[str, Any] = field(default_factory=dict)
    needs: SpanNeeds | None = None

    def __post_init__(self) -> None:
        """Copy scores and provenance and check all fields."""
        scores = fields.numbers("scores", self.scores).detach().to("cpu", torch.float32, copy=True)
        fields.set_checked_fields(self, "scores", scores)
        nonfinite = (~self.scores.isfinite()).nonzero().tolist()
        if nonfinite:
            layer, head = nonfinite[0]
            value = self.scores[layer, head].item()
            raise UserError(
                f"the score of layer {layer}, KV head {head} is {value} ({len(nonfinite)} of {scores.numel()} scores "
                "are not finite): a pattern needs a finite score for every head"
            )
        try:
            provenance = json.loads(json.dumps(self.provenance, allow_nan=False))
        except (TypeError, ValueError, RecursionError) as error:
            raise UserError(f"provenance must be what JSON can hold: {one_line(error)}") from error
        model = checked(Provenance, provenance, "a pattern", "provenance").model
        for key, size in zip(("layers", "kv_heads"), scores.shape, strict=True):
            if (recorded := getattr(model, key, None)) not in (None, size):
                raise UserError(f"provenance.model.{key}={recorded}, but the scores have {size}")
        object.__setattr__(self, "provenance", provenance)
        if self.needs is not None:
            check(isinstance(self.needs, SpanNeeds), f"needs: a {type(self.needs).__name__} is not a SpanNeeds")
            object.__setattr__(self, "needs", self.needs.of_heads(tuple(scores.shape), self.gated_layers))

    @property
    def gated_heads(self) -> int:
        """The number of KV heads in gated layers, of which a sparsity is a fraction."""
        return len(self.gated_layers) * self.scores.shape[1]

    @property
    def holds_gates(self) -> bool:
        """Whether scores are, or may be, gates (1 = full attention): in [0, 1], and not from another kind of method."""
        low, high = self.scores[list(self.gated_layers)].aminmax()
        return bool(low >= -0.01 and high <= 1.01) and self._other_kind() is None

    def _other_kind(self) -> str | None:
        """The method whose scores are not gates, if provenance names one."""
        method = (self.provenance.get("settings") or {}).get("method") or {}
        name, prior = method.get("name", "duo"), method.get("prior")
        if method.get("gate") == "nested":
            return "nested"
        return name if name != "duo" else None if prior is None else f"{name} with a prior"

    def binarize(self, sparsity: float | None = None, threshold: float | None = None) -> HeadMask:
        """Decide which heads stream, by budget or by score.

        Args:
            sparsity: in [0, 1]; exactly `round(sparsity * gated_heads)` heads stream, the first in the order above.
            threshold: heads with at least this score (compared in float32) are retrieval heads.

        Warns:
            TieWarning: `sparsity` separates heads with the same score, so the order above decides.

        Raises:
            UserError: not exactly one of the two is given, it is out of range, or `threshold` is given and the scores
                are not gates.
        """
        if (sparsity is None) == (threshold is None):
            raise UserError(f"pass either sparsity or threshold, not {'both' if threshold is not None else 'neither'}")
        if threshold is not None and (method := self._other_kind()) is not None:
            raise UserError(
                f"threshold={threshold}: scores of method={method} order the heads and are not gates, so a threshold "
                "means nothing; pass sparsity"
            )
        budget = self.provenance.get("budget")
        if budget is not None and sparsity not in (None, budget, 0, 1):
            warnings.warn(f"this pattern was refined for sparsity={budget}, not {sparsity}", stacklevel=2)
        gated = list(self.gated_layers)
        retrieval = torch.ones_like(self.scores, dtype=torch.bool)
        if sparsity is not None:
            if not isinstance(sparsity, Real) or isinstance(sparsity, bool):
                raise UserError(f"sparsity={sparsity!r:.80} is not a number")
            if not 0 <= sparsity <= 1:
                raise UserError(f"sparsity={sparsity} must lie in [0, 1]: the fraction of KV heads that stream")
            ranked = self.scores[gated].flatten().sort(stable=True)
            streaming = round(sparsity * self.gated_heads)
            kept = torch.ones(self.gated_heads, dtype=torch.bool)
            kept[ranked.indices[:streaming]] = False
            if tie := _tie(ranked.values, streaming):
                warnings.warn(f"sparsity={sparsity:g} {tie}", TieWarning, stacklevel=2)
            retrieval[gated] = kept.view(len(gated), -1)
        elif threshold is not None:
            if not isinstance(threshold, Real) or isinstance(threshold, bool) or math.isnan(threshold):
                raise UserError(f"threshold={threshold!r:.80} is not a number")
            retrieval[gated] = self.scores[gated] >= threshold
        return HeadMask(retrieval, self.sink_size, self.recent_size, self.gated_layers)

    def allocate(self, cache: float, length: int) -> HeadSpans:
        """Give each head an attention span, such that all of them together keep a share of the full cache.

        With `needs`, bytes go where they lower the loss most, see `duo_id.patterns.allocation.best_levels`; without
        them there are two spans, all tokens and `recent_size`, and as many heads as fit see all, in the order above.

        Args:
            cache: the budget in (0, 1], a share of the bytes that the full cache of the gated layers takes at `length`.
                It is never exceeded, and no head's next span fits in what is left of it.
            length: of the context, in tokens.

        Warns:
            UserWarning: the sink and the smallest span hold the whole context, so that all heads see it.
            TieWarning: there are no `needs`, and heads of the same score get different spans, by the order above.

        Raises:
            UserError: `cache` or `length` is out of range, or the sinks and the smallest spans alone exceed the budget.
        """
        spans = allocation.allocate(self, cache, length)
        if self.needs is None:
            gated = list(self.gated_layers)
            streaming = int((~spans.retrieval[gated]).sum())
            if tie := _tie(self.scores[gated].flatten().sort().values, streaming):
                warnings.warn(f"cache={cache:g} at length={length} {tie}", TieWarning, stacklevel=2)
        return spans

    @classmethod
    def from_pretrained(cls, source: str | Path) -> "HeadPattern":
        """Read a pattern.

        Args:
            source: a shipped name, a run folder, its `heads/` folder, a `heads.json`, a folder or table of scores of
                DuoAttention's, or a repo of the hub: see `duo_id.patterns.files.read_heads`.

        Raises:
            UserError: there is none, or it is damaged; the message names the file.
        """
        return files.read_heads(source, cls)

    def save(self, folder: str | Path, sparsities: Iterable[float] = (0.25, 0.5, 0.75)) -> None:
        """Write the pattern and its masks at some sparsities, each file atomically, `heads.json` last.

        Masks of an earlier export at other sparsities are removed, and its spans.

        Raises:
            UserError: a sparsity is outside [0, 1], or `folder` is no path; nothing is written.
        """
        check(isinstance(folder, str | PathLike), f"folder: a {type(folder).__name__} is no path")
        ascending = fields.fractions("sparsities", sparsities)
        masks = {sparsity: self.binarize(sparsity=sparsity).retrieval for sparsity in ascending}
        files.write_heads(self, masks, folder)

    def cells(self) -> Cells:
        """The scores as figures draw them: gates, or another kind of scores."""
        values = self.scores.numpy()
        if self.holds_gates:
            return Cells(values, self.gated_layers, "gate α (1 = retrieval)", (0.0, 1.0))
        low, high = (value.item() for value in self.scores[list(self.gated_layers)].aminmax())
        return Cells(values, self.gated_layers, "score (higher = retrieval)", (low, high))

    @naming_extras("plot")
    def plot(self, sparsity: float | None = None, *, title: str | None = None, mask: HeadMask | None = None) -> Any:
        """Heatmap of the scores, layers x KV heads, and next to it a mask.

        Args:
            sparsity: of the mask; None: no mask, or `mask`.
            title: of the figure; None: the model's name, if the provenance has it.
            mask: any other mask of the same shape.

        Returns:
            a `matplotlib.figure.Figure`, which notebooks show.

        Raises:
            UserError: the mask has another shape, or both are given.
        """
        from duo_id.patterns.heatmap import plot_heads  # matplotlib, which nothing else here needs

        if sparsity is not None:
            check(mask is None, "pass either sparsity or mask, not both")
            mask = self.binarize(sparsity=sparsity)
        if mask is not None:
            check(isinstance(mask, HeadMask), f"mask: a {type(mask).__name__} is not a HeadMask; spans have a plot()")
            layers, kv_heads = self.scores.shape
            mask.check_fits(layers, kv_heads, "the pattern")
        model = self.provenance.get("model") or {}
        name = model.get("name") or model.get("id")
        return plot_heads(self.cells(), None if mask is None else mask.cells(), name if title is None else title)

    @naming_extras("the heatmap")
    def _repr_html_(self) -> str:
        """What notebooks show: the heatmap, and below it the shape and the sizes."""
        from duo_id.common.figures import as_html  # as above

        return as_html(self.plot(), repr(self))

    def check_fits(self, layers: int, kv_heads: int, model_name: str) -> None:
        """Raise a `UserError` unless the model `model_name` has this many layers and KV heads."""
        model_id = (self.provenance.get("model") or {}).get("id")
        kind = f"pattern (of {model_id})" if model_id else "pattern"
        fields.check_fits(kind, self.scores, layers, kv_heads, model_name)

    def check_scores(self, gated_layers: Iterable[int]) -> None:
        """Raise a `UserError` unless the heads of all these layers have scores."""
        unscored = sorted(set(gated_layers) - set(self.gated_layers))
        if unscored:
            raise UserError(
                f"this head pattern has scores for layers {list(self.gated_layers)}, but not for {unscored}, which are "
                "needed to order their heads"
            )

    def __eq__(self, other: object) -> bool:
        """Whether scores, window, gated layers, provenance and needs are all equal."""
        return (
            isinstance(other, HeadPattern)
            and fields.identity(self, self.scores) == fields.identity(other, other.scores)
            and (self.provenance, self.needs) == (other.provenance, other.needs)
        )

    def __repr__(self) -> str:
        """Shape and sizes, not the single heads."""
        low, high = self.scores[list(self.gated_layers)].aminmax()
        needs = "" if self.needs is None else f", needs at {len(self.needs.levels)} spans"
        return f"HeadPattern({fields.summary(self, self.scores)}, scores in [{low:.4g}, {high:.4g}]{needs})"


def _tie(ranked: Tensor, streaming: int) -> str:
    """A warning if streaming the first `streaming` of ascending scores separates equal ones, else an empty string."""
    if not 0 < streaming < len(ranked) or ranked[streaming - 1] != ranked[streaming]:
        return ""
    equal = ranked == ranked[streaming]
    return (
        f"separates heads with the same score: {int(equal.sum())} of {len(ranked)} have {ranked[streaming]:.4g}, of "
        f"which {int(equal[:streaming].sum())} stream only because of their position, early layers first"
    )
