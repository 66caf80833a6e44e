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
    """The fraction of answer tokens at which a head attends most to the very token copied, and its needle attention.

    Source of the fraction: Wu et al. 2024, arXiv 2404.15574, section 2; here teacher-forced, so that heads are scored
    even where the model would answer wrongly. Most heads never copy and score 0; the second value, the attention on
    the needle averaged over the answer's tokens, only breaks such ties (`duo_id.methods.sample_scores.break_ties`).

    Args:
        gated_model: the model.
        sample: a training sample whose answers occur in its context.
        settings: of the method.

    Returns:
        (2, gated layers, KV heads) in [0, 1]: the fraction and the needle attention, each the maximum or the mean
        over the query heads that share a KV head, as the settings say.
    """
    ids = sample["input_ids"].to(gated_model.device)
    spans = needles(sample)
    queries = torch.cat([answer for answer, _ in spans]).to(gated_model.device) - 1
    first, last = (
        torch.cat([source[end].expand(len(source)) for _, source in spans]).to(gated_model.device) for end in (0, -1)
    )

    def copied(rows: Iterator[tuple[Tensor, Tensor]]) -> Tensor:
        hits, mass, rows_done = torch.zeros(()), torch.zeros(()), 0
        for positions, weights in rows:
            strongest, part = weights.argmax(-1), slice(rows_done, rows_done + len(positions))
            in_needle = (strongest >= first[part]) & (strongest <= last[part])
            keys = torch.arange(weights.shape[-1], device=weights.device)
            needle = (keys >= first[part, None]) & (keys <= last[part, None])
            mass = mass.to(weights) + torch.einsum("hqk,qk->h", weights, needle.to(weights))
            hits = hits.to(weights) + (in_needle & (ids[strongest] == ids[positions + 1])).sum(-1)
            rows_done += len(positions)
        return torch.stack([hits, mass]) / len(queries)

    return score_attention(gated_model, ids, queries, copied, settings.reduction)


find = mean_over_samples(retrieval_score)
