"""What other tools' files do not contain, and how scores of query heads become scores of KV heads."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from duo_id.common.errors import UserError, check
from duo_id.patterns.pattern import HeadPattern


@dataclass(frozen=True)
class Options:
    """What the user adds to a conversion; None: not given.

    Attributes:
        sparsity: for formats that hold a mask instead of scores; also the budget that the printed advice is for.
        layers: number of layers, if the file does not show it.
        heads: query heads per layer.
        kv_heads: KV heads per layer.
        sink_size: first tokens that a streaming head sees.
        recent_size: most recent tokens that a streaming head sees.
        model: hub id, for the provenance of the pattern.
        cache: in place of a sparsity, the share of the full cache's bytes that the heads may keep.
        length: of the context of which they keep it, in tokens.
        checkpoint: folder of the model's weights, for the format that holds them.
    """

    sparsity: float | None = None
    layers: int | None = None
    heads: int | None = None
    kv_heads: int | None = None
    sink_size: int | None = None
    recent_size: int | None = None
    model: str | None = None
    cache: float | None = None
    length: int | None = None
    checkpoint: str | None = None

    def __post_init__(self) -> None:
        """Check what was given together."""
        check(self.cache is None or self.sparsity is None, "sparsity and cache: give one of the two")
        check(
            self.cache is None or self.length is not None, "cache is a share of the cache at a length: set length=..."
        )
        check(self.length is None or self.cache is not None, "length is that of a share of the cache: set cache=...")

    def require(self, key: str, reason: str) -> int:
        """A required option; a `UserError` that names it if it is not given."""
        value = getattr(self, key)
        if value is None:
            raise UserError(f"{reason}: set {key}=...")
        return int(value)


def query_heads(pattern: HeadPattern, options: Options) -> int:
    """The number of query heads per layer of the pattern's model: from the options, else from the provenance.

    Raises:
        UserError: neither has it, or it is not a multiple of the KV heads.
    """
    recorded = (pattern.provenance.get("model") or {}).get("heads")
    heads = recorded if options.heads is None else options.heads
    if not isinstance(heads, int):
        raise UserError("this format holds scores of query heads, whose number is unknown: set heads=...")
    return _whole_groups(heads, pattern.scores.shape[1])


def pool(scores: Tensor, kv_heads: int) -> Tensor:
    """Scores of query heads (layers, heads) as scores of KV heads (layers, KV heads): the highest of each group.

    The query heads that share a KV head are adjacent. A single one that must see the whole context is enough to keep
    its keys and values, so a KV head is as important as the most important of them.

    Raises:
        UserError: the number of heads is not a multiple of the KV heads.
    """
    _whole_groups(scores.shape[1], kv_heads)
    return scores.unflatten(1, (kv_heads, -1)).amax(-1)


def repeat_scores(scores: Tensor, heads: int) -> Tensor:
    """Scores of KV heads (layers, KV heads), repeated for their query heads (layers, heads); `pool` undoes it."""
    return scores.repeat_interleave(heads // scores.shape[1], 1)


def as_pattern(
    scores: Tensor | list[list[float]], name: str, source: str, options: Options, model: dict[str, Any] | None = None
) -> HeadPattern:
    """The pattern of scores (layers, KV heads) from a file without window and with little provenance.

    Args:
        scores: as read from the file.
        name: of the format.
        source: the file, for messages.
        options: must hold the window.
        model: what the file says about the model.

    Raises:
        UserError: the window is not given, or the scores are not valid.
    """
    reason = f"{source} does not contain the window of streaming heads"
    windows = options.require("sink_size", reason), options.require("recent_size", reason)
    table = torch.as_tensor(scores, dtype=torch.float32)
    model_fields = {"layers": len(table), "kv_heads": table.shape[1]} | (model or {})
    if options.model:
        model_fields["id"] = options.model
    try:
        return HeadPattern(table, *windows, provenance={"format": name, "model": model_fields})
    except UserError as error:
        raise UserError(f"{source}: {error}") from None


def _whole_groups(heads: int, kv_heads: int) -> int:
    if heads < 1 or kv_heads < 1 or heads % kv_heads:
        raise UserError(f"{heads} query heads do not share {kv_heads} KV heads evenly: set heads=... and kv_heads=...")
    return heads
