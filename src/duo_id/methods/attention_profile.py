"""Attention profile: how much a head looks beyond its window where answers are given."""

from collections.abc import Iterator

import torch
from torch import Tensor

from duo_id.data.samples import UNSCORED, Sample
from duo_id.methods.attention_weights import score_attention
from duo_id.methods.gated_model import Subject
from duo_id.methods.settings import AttentionSettings


def attention_profile(subject: Subject, sample: Sample, settings: AttentionSettings) -> Tensor:
    """Mean attention mass that falls outside sink and window, from the tokens that predict the labelled ones.

    Args:
        subject: the model.
        sample: a training sample.
        settings: of the method.

    Returns:
        (gated layers, KV heads) in [0, 1].
    """
    queries = (sample["labels"] != UNSCORED).nonzero()[:, 0] - 1

    def distant(rows: Iterator[tuple[Tensor, Tensor]]) -> Tensor:
        total = torch.zeros(())
        for places, weights in rows:
            keys = torch.arange(weights.shape[-1], device=weights.device)
            far = ~subject.window.sees(places[:, None], keys)
            total = total.to(weights) + (weights * far).sum((1, 2))
        return total / len(queries)

    return score_attention(subject, sample["input_ids"], queries.clamp(min=0), distant, settings.reduction)
