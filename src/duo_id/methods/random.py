"""Random scores: the baseline that every method must beat."""

import torch
from torch import Tensor

from duo_id.data.datamodule import SampleModule
from duo_id.methods.run import Run
from duo_id.methods.settings import MethodSettings
from duo_id.models.gated_model import GatedModel
from duo_id.patterns.pattern import HeadPattern


def find(gated_model: GatedModel, samples: SampleModule, settings: MethodSettings, run: Run) -> HeadPattern:
    """Order the heads at random, by the run's seed."""
    run.on_accepted()
    return gated_model.pattern(random_scores(gated_model.shape, run.seed))


def random_scores(shape: tuple[int, int], seed: int) -> Tensor:
    """Scores (layers, KV heads) in [0, 1], all different."""
    ranks = torch.randperm(shape[0] * shape[1], generator=torch.Generator().manual_seed(seed))
    return ranks.view(shape) / max(len(ranks) - 1, 1)
