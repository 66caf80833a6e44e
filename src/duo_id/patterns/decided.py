"""How far each head sees, from whatever says so: a mask, spans, or a pattern with a sparsity or a threshold."""

from typing import Any

from duo_id.common.errors import UserError
from duo_id.patterns.mask import HeadMask
from duo_id.patterns.pattern import HeadPattern
from duo_id.patterns.spans import HeadSpans


def decided(heads: Any, sparsity: float | None = None, threshold: float | None = None) -> HeadMask | HeadSpans:
    """The mask or spans that `heads` stands for.

    Args:
        heads: a mask, spans, or a pattern with one of the other two.
        sparsity: of a pattern, the fraction of its KV heads that stream; see `HeadPattern.binarize`.
        threshold: of a pattern of gates, below which heads stream.

    Raises:
        UserError: `heads` is something else, or the others do not fit it.
    """
    if isinstance(heads, HeadPattern):
        return heads.binarize(sparsity, threshold)
    if not isinstance(heads, HeadMask | HeadSpans):
        raise UserError(f"a {type(heads).__name__} is neither a HeadMask, nor a HeadSpans, nor a HeadPattern")
    if sparsity is not None or threshold is not None:
        raise UserError(
            f"a {type(heads).__name__} has decided how far heads see: pass sparsity and threshold with a HeadPattern"
        )
    return heads
