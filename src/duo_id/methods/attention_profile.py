"""Attention profile: how much a head looks beyond its window from the answers."""

from collections.abc import Iterator

import torch
from torch import Tensor

from duo_id.data.samples import UNSCORED, Sample
from duo_id.methods.attention_weights import score_attention
from duo_id.methods.sample_scores import mean_over_samples
from duo_id.methods.settings import AttentionSettings
from duo_id.models.gated_model import GatedModel


def attention_profile(gated_model: GatedModel, sample: Sample, settings: AttentionSettings) -> Tensor:
    """Mean attention mass outside sink and window, from the tokens that predict the labelled ones.

    Args:
        gated_model: the model.
        sample: a training sample.
        settings: of the method.

    Returns:
        (gated layers, KV heads) in [0, 1].
    """
    queries = (sample["labels"] != UNSCORED).nonzero()[:, 0] - 1

    def distant(rows: Iterator[tuple[Tensor, Tensor]]) -> Tensor:
        total = torch.zeros(())
        for positions, weights in rows:
            keys = torch.arange(weights.shape[-1], device=weights.device)
            far = ~gated_model.window.sees(positions[:, None], keys)
            total = total.to(weights) + (weights * far).sum((1, 2))
        return total / len(queries)

    return score_attention(gated_model, sample["input_ids"], queries.clamp(min=0), distant, settings.reduction)


find = mean_over_samples(attention_profile)
