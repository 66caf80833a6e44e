"""Query-focused score: how much a head attends from the question to its answer in the context."""

from collections.abc import Iterator

import torch
from torch import Tensor

from duo_id.data.samples import Sample
from duo_id.methods.attention_weights import score_attention
from duo_id.methods.needles import needles
from duo_id.methods.sample_scores import mean_over_samples
from duo_id.methods.settings import AttentionSettings
from duo_id.models.gated_model import GatedModel

LEAD_TOKENS = 16  # tokens before the answer in the context that count as part of it: they say what it is


def query_score(gated_model: GatedModel, sample: Sample, settings: AttentionSettings) -> Tensor:
    """Attention mass from a question's tokens to the sentence that answers it, mean over tokens and questions.

    Source: QRHead, Zhang et al. 2025, arXiv 2506.09944, section 3; there the target is a whole document, here it is
    the answer in the context with the few tokens before it.

    Args:
        gated_model: the model.
        sample: a training sample whose answers occur in its context.
        settings: of the method.

    Returns:
        (gated layers, KV heads) in [0, 1].
    """
    ids = sample["input_ids"].to(gated_model.device)
    questions, first, last = [], [], []
    previous_end = 0
    for answer, source in needles(sample):
        start = max(previous_end, int(answer[0]) - LEAD_TOKENS, int(source[-1]) + 1)
        question = torch.arange(start, int(answer[0]))
        questions.append(question)
        first.append(torch.full_like(question, max(int(source[0]) - LEAD_TOKENS, 0)))
        last.append(torch.full_like(question, int(source[-1])))
        previous_end = int(answer[-1]) + 1
    queries, low, high = (torch.cat(parts).to(gated_model.device) for parts in (questions, first, last))

    def answering(rows: Iterator[tuple[Tensor, Tensor]]) -> Tensor:
        total, rows_done = torch.zeros(()), 0
        keys = torch.arange(len(ids), device=ids.device)
        for positions, weights in rows:
            block = slice(rows_done, rows_done + len(positions))
            in_answer = (keys >= low[block, None]) & (keys <= high[block, None])
            total = total.to(weights) + (weights * in_answer).sum((1, 2))
            rows_done += len(positions)
        return total / max(len(queries), 1)

    return score_attention(gated_model, ids, queries, answering, settings.reduction)


find = mean_over_samples(query_score)
