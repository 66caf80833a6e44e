"""The text task: natural text whose tokens are the answer, as in language modelling."""

import random

from duo_id.common.errors import check
from duo_id.data.synthetic import DraftedTask, Piece


class TextTask(DraftedTask):
    """Hay whose last `text_tokens` tokens, except the first `text_skip` of the sample, are one answer."""

    def prepare(self) -> None:
        """Find where labels start.

        Raises:
            UserError: no token is left to label, or questions should be labelled.
        """
        score, skip = self.settings.score, self.settings.text_skip
        check(score == "answers", f"data.score={score}: text has no questions, choose answers, or data.mixture.text=0")
        self.skip = max(skip, len(self.start), 1)  # nothing precedes the first token, so it cannot be predicted
        self.require(self.skip + 1, f"tokens after data.text_skip={skip}", "data.text_skip")

    def draft(self, rng: random.Random, length: int) -> tuple[list[int], list[Piece]]:
        """Hay, split where labels start."""
        tokens = self.start + self.hay(rng, length - len(self.start))
        begin = max(self.skip, len(tokens) - (self.settings.text_tokens or len(tokens)))
        return tokens[:begin], [("answer", tokens[begin:])]
