"""Which heads must see the whole context: as scores (`HeadPattern`), and as a decision for deployment (`HeadMask`)."""

import json
import math
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from duo_id.common.documents import MOST_TOKENS, checked, excerpt
from duo_id.common.errors import UserError
from duo_id.patterns.provenance import Provenance


class TieWarning(UserWarning):
    """A mask separates heads that have the same score."""


MOST_HEADS = 2**12  # layers, and KV heads of a layer


@dataclass(frozen=True, eq=False, repr=False)
class HeadMask:
    """The decision: which heads keep a full KV cache (retrieval) and which a constant one (streaming).

    Attributes:
        retrieval: bool CPU tensor (layers, KV heads); True = retrieval. Rows of layers without gates are True.
        sink_size: first tokens that a streaming head sees.
        recent_size: most recent tokens that a streaming head sees, including the current one.
        gated_layers: the layers that the mask covers, ascending; None at construction means all. Other layers keep
            their own attention and do not count in the sparsity.
    """

    retrieval: Tensor
    sink_size: int
    recent_size: int
    gated_layers: tuple[int, ...] = None  # type: ignore[assignment]

    def __post_init__(self) -> None:
        """Copy the mask and check all fields."""
        retrieval = torch.as_tensor(self.retrieval).detach().to("cpu", copy=True)
        if retrieval.dtype != torch.bool:
            raise UserError(f"a head mask holds bools, not {retrieval.dtype}: binarize a HeadPattern")
        _set_checked_fields(self, "retrieval", retrieval)

    @property
    def sparsity(self) -> float:
        """Streaming heads as a fraction of all KV heads in gated layers."""
        gated = self.retrieval[list(self.gated_layers)]
        return 1 - int(gated.sum()) / gated.numel()

    def check_fits(self, layers: int, kv_heads: int, model_name: str) -> None:
        """Raise a `UserError` unless the model `model_name` has this many layers and KV heads."""
        _check_fits("mask", self.retrieval, layers, kv_heads, model_name)

    def __eq__(self, other: object) -> bool:
        """Whether the same heads stream, with the same window."""
        return isinstance(other, HeadMask) and _identity(self, self.retrieval) == _identity(other, other.retrieval)

    def __repr__(self) -> str:
        """Shape and sizes, not the single heads."""
        return f"HeadMask({_summary(self, self.retrieval)}, sparsity={self.sparsity:.4g})"


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
    """

    scores: Tensor
    sink_size: int
    recent_size: int
    gated_layers: tuple[int, ...] = None  # type: ignore[assignment]
    provenance: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Copy scores and provenance and check all fields."""
        scores = torch.as_tensor(self.scores).detach().to("cpu", torch.float32, copy=True)
        _set_checked_fields(self, "scores", scores)
        nonfinite = (~self.scores.isfinite()).nonzero().tolist()
        if nonfinite:
            layer, head = nonfinite[0]
            value = self.scores[layer, head].item()
            raise UserError(
                f"the score of layer {layer}, KV head {head} is {value} ({len(nonfinite)} of {scores.numel()} scores "
                "are not finite): a pattern needs a finite score for every head"
            )
        provenance = json.loads(json.dumps(self.provenance, allow_nan=False))
        model = checked(Provenance, provenance, "a pattern", "provenance").model
        for key, size in zip(("layers", "kv_heads"), scores.shape, strict=True):
            if (recorded := getattr(model, key, None)) not in (None, size):
                raise UserError(f"provenance.model.{key}={recorded}, but the scores have {size}")
        object.__setattr__(self, "provenance", provenance)

    @property
    def gated_heads(self) -> int:
        """The number of KV heads in gated layers, of which a sparsity is a fraction."""
        return len(self.gated_layers) * self.scores.shape[1]

    @property
    def holds_gates(self) -> bool:
        """Whether scores are, or may be, gates (1 = full attention): in [0, 1], and not from another kind of method."""
        low, high = self.scores[list(self.gated_layers)].aminmax()
        method = (self.provenance.get("settings") or {}).get("method") or {}
        blends = method.get("name", "duo") == "duo" and method.get("gate") != "nested" and method.get("prior") is None
        return bool(low >= -0.01 and high <= 1.01) and blends

    def binarize(self, sparsity: float | None = None, threshold: float | None = None) -> HeadMask:
        """Decide which heads stream, by budget or by score.

        Args:
            sparsity: in [0, 1]; exactly `round(sparsity * gated_heads)` heads stream, the first in the order above.
            threshold: heads with at least this score (compared in float32) are retrieval heads.

        Warns:
            TieWarning: `sparsity` separates heads with the same score, so the order above decides.

        Raises:
            UserError: not exactly one of the two is given, or it is out of range.
        """
        if (sparsity is None) == (threshold is None):
            raise UserError(f"pass either sparsity or threshold, not {'both' if threshold is not None else 'neither'}")
        budget = self.provenance.get("budget")
        if budget is not None and sparsity not in (None, budget, 0, 1):
            warnings.warn(f"this pattern was refined for sparsity={budget}, not {sparsity}", stacklevel=2)
        gated = list(self.gated_layers)
        retrieval = torch.ones_like(self.scores, dtype=torch.bool)
        if sparsity is not None:
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
            if math.isnan(threshold):
                raise UserError("threshold=nan is not a number")
            retrieval[gated] = self.scores[gated] >= threshold
        return HeadMask(retrieval, self.sink_size, self.recent_size, self.gated_layers)

    def check_fits(self, layers: int, kv_heads: int, model_name: str) -> None:
        """Raise a `UserError` unless the model `model_name` has this many layers and KV heads."""
        model_id = (self.provenance.get("model") or {}).get("id")
        kind = f"pattern (of {model_id})" if model_id else "pattern"
        _check_fits(kind, self.scores, layers, kv_heads, model_name)

    def check_scores(self, gated_layers: Iterable[int]) -> None:
        """Raise a `UserError` unless the heads of all these layers have scores."""
        unscored = sorted(set(gated_layers) - set(self.gated_layers))
        if unscored:
            raise UserError(
                f"this head pattern has scores for layers {list(self.gated_layers)}, but not for {unscored}, which are "
                "needed to order their heads"
            )

    def __eq__(self, other: object) -> bool:
        """Whether scores, window, gated layers and provenance are all equal."""
        return (
            isinstance(other, HeadPattern)
            and _identity(self, self.scores) == _identity(other, other.scores)
            and self.provenance == other.provenance
        )

    def __repr__(self) -> str:
        """Shape and sizes, not the single heads."""
        low, high = self.scores[list(self.gated_layers)].aminmax()
        return f"HeadPattern({_summary(self, self.scores)}, scores in [{low:.4g}, {high:.4g}])"


def average(patterns: Sequence[HeadPattern]) -> HeadPattern:
    """The pattern with the mean scores of several seeds, which agree in everything else; a single one is returned."""
    if len(patterns) == 1:
        return patterns[0]
    scores = torch.stack([pattern.scores for pattern in patterns]).mean(0)
    seeds = [pattern.provenance.get("seed") for pattern in patterns]
    return replace(patterns[0], scores=scores, provenance=patterns[0].provenance | {"seeds": seeds})


def normalized_ranks(scores: Tensor) -> Tensor:
    """The rank of each score (any shape), from 0 for the lowest to 1; equal scores share their mean rank."""
    _, which, counts = scores.unique(return_inverse=True, return_counts=True)
    middle = counts.cumsum(0) - (counts + 1) / 2
    return (middle / max(scores.numel() - 1, 1))[which]


def mix_prior(pattern: HeadPattern, prior: HeadPattern, weight: float) -> HeadPattern:
    """Average a pattern's scores with the ranks of a prior.

    Where a method hardly separates heads, chance decides their order; there the prior decides instead, and it changes
    little where scores differ clearly.

    Args:
        pattern: with scores in about [0, 1], such as gates.
        prior: only its order matters, over the gated layers of `pattern`.
        weight: positive weight of a head's rank in the prior (`normalized_ranks`); its own score has weight 1.

    Returns:
        the pattern with the weighted means of both.

    Raises:
        UserError: the prior has another shape, or lacks scores for a gated layer.
    """
    layers, kv_heads = pattern.scores.shape
    prior.check_fits(layers, kv_heads, "the pattern")
    prior.check_scores(pattern.gated_layers)
    gated, scores = list(pattern.gated_layers), pattern.scores.clone()
    scores[gated] = scores[gated].lerp(normalized_ranks(prior.scores[gated]), weight / (1 + weight))
    return replace(pattern, scores=scores)


def random_mask(
    layers: int,
    kv_heads: int,
    sparsity: float,
    seed: int,
    *,
    sink_size: int,
    recent_size: int,
    gated_layers: Iterable[int] | None = None,
) -> HeadMask:
    """A mask with the same budget as `HeadPattern.binarize`, but with random heads: the baseline to beat.

    Deterministic in its arguments; masks of one seed are nested over sparsity.
    """
    ranks = torch.randperm(layers * kv_heads, generator=torch.Generator().manual_seed(seed)).view(layers, kv_heads)
    gated = tuple(range(layers) if gated_layers is None else gated_layers)
    return HeadPattern(ranks, sink_size, recent_size, gated).binarize(sparsity=sparsity)


def _tie(ranked: Tensor, streaming: int) -> str:
    """A warning if streaming the first `streaming` of ascending scores separates equal ones, else an empty string."""
    if not 0 < streaming < len(ranked) or ranked[streaming - 1] != ranked[streaming]:
        return ""
    equal = ranked == ranked[streaming]
    return (
        f"separates heads with the same score: {int(equal.sum())} of {len(ranked)} have {ranked[streaming]:.4g}, of "
        f"which {int(equal[:streaming].sum())} stream only because of their position, early layers first"
    )


def _set_checked_fields(owner: HeadPattern | HeadMask, name: str, heads: Tensor) -> None:
    """Check and set the fields that patterns and masks share; `heads` (layers, KV heads) is modified in place."""
    if heads.dim() != 2 or heads.numel() == 0:
        raise UserError(f"{name} must have the shape (layers, KV heads), both at least 1, not {tuple(heads.shape)}")
    if max(heads.shape) > MOST_HEADS:
        raise UserError(
            f"{name} of shape {tuple(heads.shape)} are larger than any model: at most {MOST_HEADS} each way"
        )
    layers = range(len(heads))
    indices = list(layers if owner.gated_layers is None else owner.gated_layers)
    if not indices or any(not isinstance(layer, Integral) or layer not in layers for layer in indices):
        raise UserError(
            f"gated_layers={indices!s:.60} must name the gated layers, at least one, from 0 to {layers[-1]}"
        )
    gated = tuple(sorted({int(layer) for layer in indices}))
    heads[sorted({*layers} - {*gated})] = 1
    object.__setattr__(owner, name, heads)
    object.__setattr__(owner, "gated_layers", gated)
    for window, smallest in (("sink_size", 0), ("recent_size", 1)):
        size = getattr(owner, window)
        if not isinstance(size, Integral) or isinstance(size, bool) or not smallest <= int(size) <= MOST_TOKENS:
            most = f", at most {MOST_TOKENS}" if isinstance(size, Integral) and int(size) > MOST_TOKENS else ""
            raise UserError(f"{window}={excerpt(size)} must be a whole number of tokens, at least {smallest}{most}")
        object.__setattr__(owner, window, int(size))


def _check_fits(kind: str, heads: Tensor, layers: int, kv_heads: int, model_name: str) -> None:
    if tuple(heads.shape) != (layers, kv_heads):
        raise UserError(
            f"this head {kind} is for {heads.shape[0]} layers x {heads.shape[1]} KV heads, "
            f"but {model_name} has {layers} layers x {kv_heads} KV heads"
        )


def _identity(owner: HeadPattern | HeadMask, heads: Tensor) -> tuple[Any, ...]:
    return heads.tolist(), owner.sink_size, owner.recent_size, owner.gated_layers


def _summary(owner: HeadPattern | HeadMask, heads: Tensor) -> str:
    layers, kv_heads = heads.shape
    gated = "" if len(owner.gated_layers) == layers else f" ({len(owner.gated_layers)} layers gated)"
    return f"{layers} layers x {kv_heads} KV heads{gated}, sink_size={owner.sink_size}, recent_size={owner.recent_size}"


def random_like(pattern: HeadPattern, sparsity: float, seed: int) -> HeadMask:
    """A random mask for the model of a pattern, with the same window."""
    layers, kv_heads = pattern.scores.shape
    sizes = {"sink_size": pattern.sink_size, "recent_size": pattern.recent_size}
    return random_mask(layers, kv_heads, sparsity, seed, gated_layers=pattern.gated_layers, **sizes)
