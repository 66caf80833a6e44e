"""Which heads must see the whole context: graded (`HeadPattern`), and decided for deployment (`HeadMask`)."""

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
    """A mask parts heads that have the same score."""


MOST_HEADS = 2**12  # layers, and KV heads of a layer


@dataclass(frozen=True, eq=False, repr=False)
class HeadMask:
    """The decision: which heads keep a full KV cache (retrieval) and which a constant one (streaming).

    Attributes:
        retrieval: bool CPU tensor (layers, KV heads); True = retrieval. Rows of layers without gates are True.
        sink_size: first tokens that a streaming head sees.
        recent_size: latest tokens that a streaming head sees, the current one among them.
        gated_layers: the layers that the mask decides about, ascending; None at construction means all. The others
            keep their own attention and do not count in the sparsity.
    """

    retrieval: Tensor
    sink_size: int
    recent_size: int
    gated_layers: tuple[int, ...] = None  # type: ignore[assignment]

    def __post_init__(self) -> None:
        """Take a copy of the mask and check everything."""
        retrieval = torch.as_tensor(self.retrieval).detach().to("cpu", copy=True)
        if retrieval.dtype != torch.bool:
            raise UserError(f"a head mask holds bools, not {retrieval.dtype}: binarize a HeadPattern")
        _complete(self, "retrieval", retrieval)

    @property
    def sparsity(self) -> float:
        """Streaming heads as a fraction of all KV heads in gated layers."""
        gated = self.retrieval[list(self.gated_layers)]
        return 1 - int(gated.sum()) / gated.numel()

    def check_fits(self, layers: int, kv_heads: int, model_name: str) -> None:
        """Raise a `UserError` unless the model `model_name` has this many layers and KV heads."""
        _check_fits("mask", self.retrieval, layers, kv_heads, model_name)

    def __eq__(self, other: object) -> bool:
        """Whether the same heads stream, over the same windows."""
        return isinstance(other, HeadMask) and _identity(self, self.retrieval) == _identity(other, other.retrieval)

    def __repr__(self) -> str:
        """The shape and the sizes, not the heads."""
        return f"HeadMask({_summary(self, self.retrieval)}, sparsity={self.sparsity:.4g})"


@dataclass(frozen=True, eq=False, repr=False)
class HeadPattern:
    """What identification found: one score for each KV head, the windows it holds for, and where it came from.

    The scores order the heads: by score, and among equal scores by layer, then by head. Heads stream from the start
    of this order, so of two equal heads the one in the earlier layer (then the one with the lower index) streams
    first, and the mask at a lower sparsity is always contained in the mask at a higher one.

    Attributes:
        scores: float32 CPU tensor (layers, KV heads), a copy of what was given; higher = retrieval. Gates lie in
            [0, 1] up to rounding; other methods may use any finite scale. Rows of layers without gates are set to 1.
        sink_size: first tokens that a streaming head sees.
        recent_size: latest tokens that a streaming head sees, the current one among them.
        gated_layers: the layers whose heads were scored, ascending; None at construction means all.
        provenance: anything that JSON can hold: the model (id, revision, layers, kv_heads), method, seed, versions.
            What is looked at has the types of `duo_id.patterns.provenance.Provenance`.
    """

    scores: Tensor
    sink_size: int
    recent_size: int
    gated_layers: tuple[int, ...] = None  # type: ignore[assignment]
    provenance: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Take copies of the scores and the provenance and check everything."""
        scores = torch.as_tensor(self.scores).detach().to("cpu", torch.float32, copy=True)
        _complete(self, "scores", scores)
        broken = (~self.scores.isfinite()).nonzero().tolist()
        if broken:
            layer, head = broken[0]
            value = self.scores[layer, head].item()
            raise UserError(
                f"the score of layer {layer}, KV head {head} is {value} ({len(broken)} of {scores.numel()} scores "
                "are not finite): a pattern needs a number for every head"
            )
        provenance = json.loads(json.dumps(self.provenance, allow_nan=False))
        model = checked(Provenance, provenance, "a pattern", "provenance").model
        for key, size in zip(("layers", "kv_heads"), scores.shape, strict=True):
            if (told := getattr(model, key, None)) not in (None, size):
                raise UserError(f"provenance.model.{key}={told} where scores have {size}")
        object.__setattr__(self, "provenance", provenance)

    @property
    def gated_heads(self) -> int:
        """How many KV heads the gated layers have: what a sparsity is a fraction of."""
        return len(self.gated_layers) * self.scores.shape[1]

    @property
    def holds_gates(self) -> bool:
        """Whether scores are gates, 1 for full attention, or may be: in [0, 1], and not told to be of another kind."""
        low, high = self.scores[list(self.gated_layers)].aminmax()
        told = (self.provenance.get("settings") or {}).get("method") or {}
        blends = told.get("name", "duo") == "duo" and told.get("gate") != "nested" and told.get("prior") is None
        return bool(low >= -0.01 and high <= 1.01) and blends

    def binarize(self, sparsity: float | None = None, threshold: float | None = None) -> HeadMask:
        """Decide which heads stream, by budget or by score.

        Args:
            sparsity: in [0, 1]; exactly `round(sparsity * gated_heads)` heads stream, the first in the order above.
            threshold: heads with a score of at least this (compared in float32) are retrieval heads.

        Warns:
            TieWarning: `sparsity` falls between heads of the same score, so that the order above decides.

        Raises:
            UserError: unless exactly one of the two is given and in range.
        """
        if (sparsity is None) == (threshold is None):
            raise UserError(f"give either sparsity or threshold, not {'both' if threshold is not None else 'neither'}")
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
        found_on = (self.provenance.get("model") or {}).get("id")
        kind = f"pattern (of {found_on})" if found_on else "pattern"
        _check_fits(kind, self.scores, layers, kv_heads, model_name)

    def check_scores(self, gated_layers: Iterable[int]) -> None:
        """Raise a `UserError` unless the heads of all these layers were scored, so that they have an order."""
        unscored = sorted(set(gated_layers) - set(self.gated_layers))
        if unscored:
            raise UserError(
                f"this head pattern has scores of layers {list(self.gated_layers)}, not of {unscored}, whose heads are "
                "to be ordered"
            )

    def __eq__(self, other: object) -> bool:
        """Whether scores, windows, gated layers and provenance are all the same."""
        return (
            isinstance(other, HeadPattern)
            and _identity(self, self.scores) == _identity(other, other.scores)
            and self.provenance == other.provenance
        )

    def __repr__(self) -> str:
        """The shape and the sizes, not the heads."""
        low, high = self.scores[list(self.gated_layers)].aminmax()
        return f"HeadPattern({_summary(self, self.scores)}, scores in [{low:.4g}, {high:.4g}])"


def average(patterns: Sequence[HeadPattern]) -> HeadPattern:
    """The pattern of the mean scores of several seeds, which share all else; of one: itself."""
    if len(patterns) == 1:
        return patterns[0]
    scores = torch.stack([pattern.scores for pattern in patterns]).mean(0)
    seeds = [pattern.provenance.get("seed") for pattern in patterns]
    return replace(patterns[0], scores=scores, provenance=patterns[0].provenance | {"seeds": seeds})


def normalized_ranks(scores: Tensor) -> Tensor:
    """Where each score stands in their order, from 0, the lowest, to 1; equal scores share a place. Of any shape."""
    _, which, counts = scores.unique(return_inverse=True, return_counts=True)
    middle = counts.cumsum(0) - (counts + 1) / 2
    return (middle / max(scores.numel() - 1, 1))[which]


def mix_prior(pattern: HeadPattern, prior: HeadPattern, weight: float) -> HeadPattern:
    """Let an order that is known already have a part in what was found.

    Where a method hardly tells heads apart, its own samples decide by chance; another order, found otherwise, decides
    there, and hardly where scores lie apart.

    Args:
        pattern: with scores in about [0, 1], such as those of gates.
        prior: whose order counts, over the gated layers of `pattern`.
        weight: positive, of a head's place in that order (`places`) beside its own score, which has weight 1.

    Returns:
        The pattern with the weighted means of both.

    Raises:
        UserError: the prior is of another shape, or lacks scores of a gated layer.
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
    """A mask with the same budget as `HeadPattern.binarize`, its heads drawn at random: the baseline to beat.

    It is a function of its arguments alone; masks of one seed are nested over sparsity.
    """
    ranks = torch.randperm(layers * kv_heads, generator=torch.Generator().manual_seed(seed)).view(layers, kv_heads)
    gated = tuple(range(layers) if gated_layers is None else gated_layers)
    return HeadPattern(ranks, sink_size, recent_size, gated).binarize(sparsity=sparsity)


def _tie(ranked: Tensor, streaming: int) -> str:
    """What is wrong with letting the first `streaming` of ascending scores stream, in words; empty: nothing."""
    if not 0 < streaming < len(ranked) or ranked[streaming - 1] != ranked[streaming]:
        return ""
    equal = ranked == ranked[streaming]
    return (
        f"parts heads of the same score: {int(equal.sum())} of {len(ranked)} have {ranked[streaming]:.4g}, of which "
        f"{int(equal[:streaming].sum())} stream by their place alone, early layers first"
    )


def _complete(owner: HeadPattern | HeadMask, name: str, heads: Tensor) -> None:
    """Check the fields that patterns and masks share and set them; `heads` (layers, KV heads) is changed in place."""
    if heads.dim() != 2 or heads.numel() == 0:
        raise UserError(f"{name} must have the shape (layers, KV heads), both at least 1, not {tuple(heads.shape)}")
    if max(heads.shape) > MOST_HEADS:
        raise UserError(
            f"{name} of {tuple(heads.shape)} heads are more than any model has: at most {MOST_HEADS} each way"
        )
    layers = range(len(heads))
    given = list(layers if owner.gated_layers is None else owner.gated_layers)
    if not given or any(not isinstance(layer, Integral) or layer not in layers for layer in given):
        raise UserError(f"gated_layers={given!s:.60} must name the gated layers, at least one, from 0 to {layers[-1]}")
    gated = tuple(sorted({int(layer) for layer in given}))
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
    """A random mask for the model of a pattern, over the same windows."""
    layers, kv_heads = pattern.scores.shape
    sizes = {"sink_size": pattern.sink_size, "recent_size": pattern.recent_size}
    return random_mask(layers, kv_heads, sparsity, seed, gated_layers=pattern.gated_layers, **sizes)
