"""Where a generated answer ends: at a token that ends texts for the model, or at one that holds the stop of a task."""

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from duo_id.models.language_model import LanguageModel, end_tokens


class Stops:
    """The tokens of a model's vocabulary that end answers.

    Args:
        model: the language model.
    """

    def __init__(self, model: LanguageModel) -> None:
        self.model = model
        self.ends = end_tokens(model)
        self._masks: dict[str | None, Tensor] = {}

    @cached_property
    def _texts(self) -> list[str]:
        """The text of each token; embeddings may be padded beyond those of the tokenizer."""
        tokenizer = self.model.tokenizer
        texts = tokenizer.batch_decode([[token] for token in range(len(tokenizer))])
        return texts + [""] * (self.model.model.config.get_text_config().vocab_size - len(texts))

    @cached_property
    def blank(self) -> Tensor:
        """(vocabulary,): tokens without text, which begin no answer."""
        blank = [not text.strip() and token not in self.ends for token, text in enumerate(self._texts)]
        return torch.tensor(blank, device=self.model.model.device)

    def at(self, stops: Sequence[str | None]) -> Tensor:
        """(stops, vocabulary): tokens that end an answer with each stop; None: only the end of a text."""
        for stop in {*stops} - self._masks.keys():
            holds = [stop is not None and stop in text for text in self._texts]
            ends = [token in self.ends or held for token, held in enumerate(holds)]
            self._masks[stop] = torch.tensor(ends, device=self.model.model.device)
        return torch.stack([self._masks[stop] for stop in stops])
