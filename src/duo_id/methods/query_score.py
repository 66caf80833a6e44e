"""Query-focused score: how much a head attends from the question to what answers it."""

from collections.abc import Iterator

import torch
from torch import Tensor

from duo_id.data.samples import Sample
from duo_id.methods.attention_weights import score_attention
from duo_id.methods.needles import needles
from duo_id.methods.sample_scores import mean_over_samples
from duo_id.methods.settings import AttentionSettings
from duo_id.models.gated_model import GatedModel

BEFORE = 16  # tokens in front of an answer in the context that belong to what answers: they say what it is


def query_score(gated_model: GatedModel, sample: Sample, settings: AttentionSettings) -> Tensor:
    """Attention mass from a question's tokens to the sentence that answers it, mean over the tokens and questions.

    Source: QRHead, Zhang et al. 2025, arXiv 2506.09944, section 3; there the target is a whole document, here the
    answer where it stands in the context, with the few tokens before it.

    Args:
        gated_model: the model.
        sample: a training sample whose answers stand in its context.
        settings: of the method.

    Returns:
        (gated layers, KV heads) in [0, 1].
    """
    ids = sample["input_ids"].to(gated_model.device)
    queries, first, last = [], [], []
    ended = 0
    for answer, source in needles(sample):
        begin = max(ended, int(answer[0]) - BEFORE, int(source[-1]) + 1)
        asked = torch.arange(begin, int(answer[0]))
        queries.append(asked)
        first.append(torch.full_like(asked, max(int(source[0]) - BEFORE, 0)))
        last.append(torch.full_like(asked, int(source[-1])))
        ended = int(answer[-1]) + 1
    places, low, high = (torch.cat(parts).to(gated_model.device) for parts in (queries, first, last))

    def answering(rows: Iterator[tuple[Tensor, Tensor]]) -> Tensor:
        total, done = torch.zeros(()), 0
        keys = torch.arange(len(ids), device=ids.device)
        for part, weights in rows:
            chosen = slice(done, done + len(part))
            inside = (keys >= low[chosen, None]) & (keys <= high[chosen, None])
            total = total.to(weights) + (weights * inside).sum((1, 2))
            done += len(part)
        return total / max(len(places), 1)

    return score_attention(gated_model, ids, places, answering, settings.reduction)


find = mean_over_samples(query_score)
