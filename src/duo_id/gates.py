"""The trained gates: parametrisations of alpha and penalties that make it sparse, one small class or function each."""

from collections.abc import Callable

import torch
from torch import Tensor, nn


class ClampedGates(nn.Module):
    """Alpha is the parameter itself, projected to [0, 1] in place between optimizer steps (DuoAttention, section 2.2).

    Float32 whatever the model computes in: bfloat16 has a grid of 1/256 above 0.5, on which late updates vanish.
    """

    def __init__(self, layers: int, kv_heads: int, initial: float = 1.0) -> None:
        """Make (layers, KV heads) gates that all start at `initial`."""
        super().__init__()
        self.weight = nn.Parameter(torch.full((layers, kv_heads), initial, dtype=torch.float32))

    def alpha(self) -> Tensor:
        """(layers, KV heads) float32 in [0, 1]; 1 = full attention."""
        return self.weight

    @torch.no_grad()
    def project_(self) -> None:
        """Bring the parameter back to where it means a gate; called after each optimizer step."""
        self.weight.clamp_(0, 1)


def l1(alpha: Tensor) -> Tensor:
    """Mean |alpha| over all gates (DuoAttention, section 2.2)."""
    return alpha.abs().mean()


GATES: dict[str, type[ClampedGates]] = {"clamp": ClampedGates}
PENALTIES: dict[str, Callable[[Tensor], Tensor]] = {"l1": l1}
