"""What a file of another tool leaves unsaid, and how scores of query heads become scores of KV heads."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from duo_id.common.errors import UserError
from duo_id.patterns.pattern import HeadPattern


@dataclass(frozen=True)
class Options:
    """What the user adds to a conversion; None: nothing.

    Attributes:
        sparsity: for what holds a decision instead of scores; also the budget that notes speak of.
        layers: of the model, where a file does not show them.
        heads: query heads of a layer.
        kv_heads: KV heads of a layer.
        sink_size: first tokens that a streaming head sees.
        recent_size: latest tokens that it sees.
        model: hub id, for the provenance of what is read.
    """

    sparsity: float | None = None
    layers: int | None = None
    heads: int | None = None
    kv_heads: int | None = None
    sink_size: int | None = None
    recent_size: int | None = None
    model: str | None = None

    def need(self, key: str, what: str) -> int:
        """An option that cannot be done without; a `UserError` that names it where it is not given."""
        value = getattr(self, key)
        if value is None:
            raise UserError(f"{what}: give {key}=...")
        return int(value)


def query_heads(pattern: HeadPattern, options: Options) -> int:
    """How many query heads a layer of the pattern's model has: what the options say, else the provenance.

    Raises:
        UserError: neither says it, or it is no multiple of the KV heads.
    """
    known = (pattern.provenance.get("model") or {}).get("heads")
    heads = known if options.heads is None else options.heads
    if not isinstance(heads, int):
        raise UserError("scores of KV heads are spread over query heads, and nothing says how many: give heads=...")
    return _whole_groups(heads, pattern.scores.shape[1])


def pool(scores: Tensor, kv_heads: int) -> Tensor:
    """Scores of query heads (layers, heads) as scores of KV heads (layers, KV heads): the highest of each group.

    The query heads that share a KV head are neighbours, and one of them that must see the whole context is enough to
    keep its keys and values: so a KV head is as important as the most important of them.

    Raises:
        UserError: the heads are no multiple of the KV heads.
    """
    _whole_groups(scores.shape[1], kv_heads)
    return scores.unflatten(1, (kv_heads, -1)).amax(-1)


def spread(scores: Tensor, heads: int) -> Tensor:
    """Scores of KV heads (layers, KV heads) for query heads (layers, heads), each its KV head's; `pool` undoes it."""
    return scores.repeat_interleave(heads // scores.shape[1], 1)


def as_pattern(
    scores: Tensor | list[list[float]], name: str, place: str, options: Options, model: dict[str, Any] | None = None
) -> HeadPattern:
    """The pattern of scores (layers, KV heads) that came without windows and with little provenance.

    Args:
        scores: as they stood in the file.
        name: of the format.
        place: the file, for messages.
        options: which must hold the windows.
        model: what the file says about the model.

    Raises:
        UserError: the windows are not given, or something is no pattern.
    """
    what = f"{place} does not say how long the windows of streaming heads are"
    windows = options.need("sink_size", what), options.need("recent_size", what)
    table = torch.as_tensor(scores, dtype=torch.float32)
    described = {"layers": len(table), "kv_heads": table.shape[1]} | (model or {})
    if options.model:
        described["id"] = options.model
    try:
        return HeadPattern(table, *windows, provenance={"format": name, "model": described})
    except UserError as error:
        raise UserError(f"{place}: {error}") from None


def _whole_groups(heads: int, kv_heads: int) -> int:
    if heads < 1 or kv_heads < 1 or heads % kv_heads:
        raise UserError(f"{heads} query heads do not share {kv_heads} KV heads evenly: give heads=... and kv_heads=...")
    return heads
