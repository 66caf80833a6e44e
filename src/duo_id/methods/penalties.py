"""Penalties on the openness of the gates, which make them sparse: one small class each."""

import torch
from torch import Tensor, nn


class L1(nn.Module):
    """Mean openness of the gates (DuoAttention, section 2.2)."""

    def forward(self, openness: Tensor, progress: float) -> Tensor:
        """A scalar.

        Args:
            openness: (layers, KV heads) in [0, 1], see `duo_id.methods.gates`.
            progress: fraction of the training steps done.
        """
        return openness.abs().mean()


class Binary(nn.Module):
    """Pushes gates to 0 or 1: the mean of 4 * openness * (1 - openness), which is 1 if all gates are half open."""

    def forward(self, openness: Tensor, progress: float) -> Tensor:
        """As `L1`."""
        return (4 * openness * (1 - openness)).mean()


class TargetSparsity(nn.Module):
    """A Lagrangian that holds the sparsity at a target, which rises from 0 over the first steps.

    The optimizer maximises over the multipliers of the difference and of its square.
    Source: PruLong (Bhaskar et al. 2025, arXiv 2506.17121), after Wang et al. 2020 (arXiv 1910.04732).
    """

    def __init__(self, target: float, rise: float) -> None:
        """Hold `target`, in [0, 1], from the fraction `rise` of the steps on."""
        super().__init__()
        self.target, self.rise = target, rise
        self.multipliers = nn.Parameter(torch.zeros(2))

    def forward(self, openness: Tensor, progress: float) -> Tensor:
        """As `L1`, with a gradient for the multipliers too."""
        target = self.target * min(1.0, progress / self.rise if self.rise else 1.0)
        missing = target - (1 - openness.mean())
        return self.multipliers[0] * missing + self.multipliers[1] * missing.square()


PENALTIES: dict[str, type[nn.Module]] = {"l1": L1, "binary": Binary, "target": TargetSparsity}
