"""Reconstruction score: how strongly a head looks back while the model repeats its context."""

from collections.abc import Iterator

import torch
from torch import Tensor

from duo_id.common.errors import UserError
from duo_id.data.haystack import tokenize
from duo_id.data.samples import Sample
from duo_id.methods.attention_weights import score_attention
from duo_id.methods.sample_scores import mean_over_samples
from duo_id.methods.settings import AttentionSettings
from duo_id.models.gated_model import GatedModel

REQUEST = "\n\nThe whole text again, word for word:\n\n"


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
    request = torch.tensor(tokenize(gated_model.model.tokenizer, REQUEST))
    limit, window = gated_model.model.max_length, gated_model.window
    text = sample["input_ids"]
    if limit is not None:
        text = text[: max(limit - len(request), 0) // 2]
    if len(text) + len(request) <= window.recent_size or len(text) <= window.sink_size:
        raise UserError(
            f"method=reconstruction repeats {len(text)} tokens, all within the window of {window.recent_size}: raise "
            "data.length_min, or lower method.recent_size"
        )
    ids = torch.cat([text, request, text])
    queries = torch.arange(len(text) + len(request) - 1, len(ids) - 1)

    def highest_weights(rows: Iterator[tuple[Tensor, Tensor]]) -> Tensor:
        highest = torch.zeros(())
        for positions, weights in rows:
            keys = torch.arange(len(text), device=weights.device)
            far = ~window.sees(positions[:, None], keys)
            highest = torch.maximum(highest.to(weights), (weights[:, :, : len(text)] * far).amax(1))
        return highest[:, window.sink_size :].mean(-1)

    return score_attention(gated_model, ids, queries, highest_weights, settings.reduction)


find = mean_over_samples(reconstruction)
