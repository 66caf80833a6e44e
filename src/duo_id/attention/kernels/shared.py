"""What the Triton kernels share: one step of the online softmax, and the shapes of their blocks.

Softmax is online, in base 2. The query group of a KV head shares its keys without repeating them.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2_E = 1.4426950408889634
TILE_BYTES = 128 * 128 * 2  # of a block of keys, so that the stages fit into shared memory

FAR_BELOW = tl.constexpr(-1e30)  # below any score; unlike -inf it can be subtracted from itself


@triton.jit
def fold(query, key, value, visible, row_max, total, out, scale, MASKED: tl.constexpr, PRECISION: tl.constexpr):  # type: ignore[no-untyped-def]
    """Fold one block of keys (n, dim) into the running softmax of the queries (m, dim)."""
    scores = tl.dot(query, tl.trans(key), input_precision=PRECISION) * scale
    if MASKED:
        scores = tl.where(visible, scores, float("-inf"))
    return fold_scores(scores, value, row_max, total, out, PRECISION)


@triton.jit
def fold_scores(scores, value, row_max, total, out, PRECISION: tl.constexpr):  # type: ignore[no-untyped-def]
    """Fold the scores (m, n) of one block of values (n, dim) into the running softmax."""
    new_max = tl.maximum(row_max, tl.max(scores, 1))
    weights = tl.exp2(scores - new_max[:, None])
    rescale = tl.exp2(row_max - new_max)
    total = total * rescale + tl.sum(weights, 1)
    out = tl.dot(weights.to(value.dtype), value, out * rescale[:, None], input_precision=PRECISION)
    return new_max, total, out


def padded_dim(dim: int) -> int:
    """The width of a head as kernels see it: a power of 2, at least 16."""
    return max(16, triton.next_power_of_2(dim))


def fit(block: int, query: Tensor) -> int:
    """The largest block, up to `block`, whose keys take no more than `TILE_BYTES`."""
    return max(16, min(block, TILE_BYTES // (padded_dim(query.shape[-1]) * query.element_size())))


def precision(query: Tensor) -> str:
    """How products are computed: float32 at full precision, not rounded to TF32."""
    return "ieee" if query.dtype == torch.float32 else "tf32"
