"""Random scores: what every method must beat."""

import torch
from torch import Tensor


def random_scores(shape: tuple[int, int], seed: int) -> Tensor:
    """Scores that order the heads at random, a function of the seed: what every method must beat."""
    drawn = torch.randperm(shape[0] * shape[1], generator=torch.Generator().manual_seed(seed))
    return drawn.view(shape) / max(len(drawn) - 1, 1)
