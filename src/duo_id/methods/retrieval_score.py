"""Retrieval score: how often a head's strongest attention is on the token that is copied next."""

from collections.abc import Iterator

import torch
from torch import Tensor

from duo_id.data.samples import Sample
from duo_id.methods.attention_weights import score_attention
from duo_id.methods.needles import needles
from duo_id.methods.sample_scores import mean_over_samples
from duo_id.methods.settings import AttentionSettings
from duo_id.models.gated_model import GatedModel


def retrieval_score(gated_model: GatedModel, sample: Sample, settings: AttentionSettings) -> Tensor:
    """The fraction of answer tokens for which a head attends most to that very token, and its attention to the needle.

    Source of the first: Wu et al. 2024, arXiv 2404.15574, section 2, teacher-forced: the answer's tokens are given, so
    that heads are scored also where the model would have answered wrongly. Most heads never copy, and all of these
    score 0. Which of them are nearest to it the second tells: the weight that falls on the needle, mean over the
    answer's tokens. It decides among equals alone (`duo_id.methods.sample_scores.settled`).

    Args:
        gated_model: the model.
        sample: a training sample whose answers stand in its context.
        settings: of the method.

    Returns:
        (2, gated layers, KV heads) in [0, 1]: the fraction, and the weight. Of the query heads that share a KV head
        each takes the highest or the mean, as the settings say.
    """
    ids = sample["input_ids"].to(gated_model.device)
    found = needles(sample)
    queries = torch.cat([answer for answer, _ in found]).to(gated_model.device) - 1
    first, last = (
        torch.cat([source[end].expand(len(source)) for _, source in found]).to(gated_model.device) for end in (0, -1)
    )

    def copied(rows: Iterator[tuple[Tensor, Tensor]]) -> Tensor:
        hits, mass, done = torch.zeros(()), torch.zeros(()), 0
        for places, weights in rows:
            most, part = weights.argmax(-1), slice(done, done + len(places))
            inside = (most >= first[part]) & (most <= last[part])
            keys = torch.arange(weights.shape[-1], device=weights.device)
            needle = (keys >= first[part, None]) & (keys <= last[part, None])
            mass = mass.to(weights) + torch.einsum("hqk,qk->h", weights, needle.to(weights))
            hits = hits.to(weights) + (inside & (ids[most] == ids[places + 1])).sum(-1)
            done += len(places)
        return torch.stack([hits, mass]) / len(queries)

    return score_attention(gated_model, ids, queries, copied, settings.reduction)


find = mean_over_samples(retrieval_score)
