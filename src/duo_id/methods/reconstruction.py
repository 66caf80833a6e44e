"""Reconstruction score: how strongly a head looks back while the model repeats its context."""

from collections.abc import Iterator

import torch
from torch import Tensor

from duo_id.data.samples import Sample
from duo_id.methods.attention_weights import score_attention
from duo_id.methods.replay import replayed
from duo_id.methods.sample_scores import mean_over_samples
from duo_id.methods.settings import AttentionSettings
from duo_id.models.gated_model import GatedModel


def reconstruction(gated_model: GatedModel, sample: Sample, settings: AttentionSettings) -> Tensor:
    """The highest attention that each token of a text gets while the text is repeated, mean over the tokens.

    Only attention beyond the window counts. Source: the importance score of KVzip, Kim et al. 2025, arXiv 2505.23416,
    section 3, there of single cache entries, here of a head.

    Args:
        gated_model: the model.
        sample: a training sample; cut so that it fits the model twice.
        settings: of the method.

    Returns:
        (gated layers, KV heads) in [0, 1].

    Raises:
        UserError: the text is too short for anything to lie outside the window.
    """
    replay, window = replayed(gated_model, sample, settings.name), gated_model.window

    def highest_weights(rows: Iterator[tuple[Tensor, Tensor]]) -> Tensor:
        highest = torch.zeros(())
        for positions, weights in rows:
            keys = torch.arange(replay.tokens, device=weights.device)
            far = ~window.sees(positions[:, None], keys)
            highest = torch.maximum(highest.to(weights), (weights[:, :, : replay.tokens] * far).amax(1))
        return highest[:, window.sink_size :].mean(-1)

    return score_attention(gated_model, replay.ids, replay.queries, highest_weights, settings.reduction)


find = mean_over_samples(reconstruction)
