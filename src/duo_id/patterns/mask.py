"""Which heads see the whole context and which a window: the decision for deployment with two kinds of heads."""

from dataclasses import dataclass

import torch
from torch import Tensor

from duo_id.common.errors import UserError
from duo_id.patterns import fields
from duo_id.patterns.cells import Cells
from duo_id.patterns.spans import ALL


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
        retrieval = fields.numbers("retrieval", self.retrieval).detach().to("cpu", copy=True)
        if retrieval.dtype != torch.bool:
            raise UserError(f"a head mask holds bools, not {retrieval.dtype}: binarize a HeadPattern")
        fields.set_checked_fields(self, "retrieval", retrieval)

    @property
    def spans(self) -> Tensor:
        """int32 (layers, KV heads): latest tokens that each head sees beside the sink; -1 = all, see `HeadSpans`."""
        return torch.where(self.retrieval, ALL, self.recent_size).to(torch.int32)

    @property
    def sparsity(self) -> float:
        """Streaming heads as a fraction of all KV heads in gated layers."""
        gated = self.retrieval[list(self.gated_layers)]
        return 1 - int(gated.sum()) / gated.numel()

    def cells(self) -> Cells:
        """The mask as figures draw it."""
        title = f"{100 * self.sparsity:.3g}% of the heads stream"
        return Cells(self.retrieval.numpy(), self.gated_layers, title, (0.0, 1.0))

    def check_fits(self, layers: int, kv_heads: int, model_name: str) -> None:
        """Raise a `UserError` unless the model `model_name` has this many layers and KV heads."""
        fields.check_fits("mask", self.retrieval, layers, kv_heads, model_name)

    def __eq__(self, other: object) -> bool:
        """Whether the same heads stream, with the same window."""
        return isinstance(other, HeadMask) and fields.identity(self, self.retrieval) == fields.identity(
            other, other.retrieval
        )

    def __repr__(self) -> str:
        """Shape and sizes, not the single heads."""
        return f"HeadMask({fields.summary(self, self.retrieval)}, sparsity={self.sparsity:.4g})"
