"""The text task: natural text in which every token is an answer, as in language modelling."""

import random

from duo_id.config import require
from duo_id.data.drafting import DraftedTask, Piece


class TextTask(DraftedTask):
    """Hay without anything around it; all tokens but the first `text_skip` are labelled, as one answer."""

    def prepare(self) -> None:
        """Find where labels begin.

        Raises:
            UserError: no token is left to label, or questions are to be labelled.
        """
        score, skip = self.settings.score, self.settings.text_skip
        require(score == "answers", f"data.score={score}: text has no questions, choose answers, or leave text out")
        self.skip = max(skip, len(self.start), 1)  # nothing stands before a first token that could tell it
        self.need(self.skip + 1, f"tokens after data.text_skip={skip}", "data.text_skip")

    def draft(self, rng: random.Random, length: int) -> tuple[list[int], list[Piece]]:
        """Hay, cut in two where labels begin."""
        tokens = self.start + self.hay(rng, length - len(self.start))
        return tokens[: self.skip], [("answer", tokens[self.skip :])]
