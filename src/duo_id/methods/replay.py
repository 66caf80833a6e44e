"""A text that the model is made to repeat: what scores that replay the context run on."""

from dataclasses import dataclass

import torch
from torch import Tensor

from duo_id.common.errors import UserError
from duo_id.data.haystack import tokenize
from duo_id.data.samples import Sample
from duo_id.models.gated_model import GatedModel

REQUEST = "\n\nThe whole text again, word for word:\n\n"


@dataclass(frozen=True)
class Replay:
    """A text, a request to repeat it, and the text again.

    Attributes:
        ids: (n,) int64, all of it.
        tokens: of the text.
        queries: (tokens,) int64, the positions from which the repeated tokens are predicted.
    """

    ids: Tensor
    tokens: int
    queries: Tensor


def replayed(gated_model: GatedModel, sample: Sample, method: str) -> Replay:
    """A sample's text and its replay.

    Args:
        gated_model: the model.
        sample: a training sample; cut so that it fits the model twice.
        method: that asks for it, for the message.

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
            f"method={method} repeats {len(text)} tokens, all within the window of {window.recent_size}: raise "
            "data.length_min, or lower method.recent_size"
        )
    ids = torch.cat([text, request, text])
    return Replay(ids, len(text), torch.arange(len(text) + len(request) - 1, len(ids) - 1))
