"""The induction task: random tokens, and stretches of them that come again."""

import math
import random
from array import array
from itertools import pairwise

from duo_id.config import require
from duo_id.data.drafting import DraftedTask, Piece
from duo_id.errors import UserError

BEGINNING = 4  # tokens of a stretch that come again before those that are scored
APART = "\n"
TRIES = 100  # places where a stretch may begin that are looked at


class InductionTask(DraftedTask):
    """The tokens of hay in random order, then `num_passkeys` stretches of them, `answer_tokens` of each scored.

    Repeated random tokens are what induction heads are told by (Olsson et al. 2022, arXiv 2209.11895): nothing but
    the earlier place, at any distance, tells the next token. Stretches are spread over the context, come again in
    random order, and their first tokens stand in it once.
    """

    def prepare(self) -> None:
        """Tokenise what stands between stretches.

        Raises:
            UserError: the stretches, in the context and after it, are longer than a sample, or all at one depth.
        """
        settings, count = self.settings, self.settings.num_passkeys
        self.apart = self.tokens(APART)
        self.stretch = BEGINNING + settings.answer_tokens
        self.num_fixed = len(self.start) + count * (2 * len(self.apart) + self.stretch)
        span = settings.depth_max - settings.depth_min
        require(span > 0, f"data.depth_max={settings.depth_max} must exceed data.depth_min: stretches need room")
        self.need(
            self.num_fixed + math.ceil((2 * self.stretch * count + 1) / span),  # twice, for a choice of places
            f"{count} stretches with {settings.answer_tokens} tokens that come again",
            "data.num_passkeys or data.answer_tokens",
        )

    def draft(self, rng: random.Random, length: int) -> tuple[list[int], list[Piece]]:
        """Hay in random order, and stretches of it.

        Raises:
            UserError: the haystack has too few different tokens.
        """
        count, size = self.settings.num_passkeys, length - self.num_fixed
        hay = self.hay(rng, size)
        rng.shuffle(hay)
        first, last = (round(depth * size) for depth in (self.settings.depth_min, self.settings.depth_max))
        ends = [first + (last - first) * part // count for part in range(count + 1)]
        places = [self._place(rng, hay, range(begin, end - self.stretch + 1)) for begin, end in pairwise(ends)]
        pieces: list[Piece] = []
        for place in rng.sample(places, count):
            begin = place + BEGINNING
            pieces.append(("question", self.apart + hay[place:begin]))
            pieces += ("answer", hay[begin : place + self.stretch]), ("separator", self.apart)
        return self.start + hay, pieces

    def _place(self, rng: random.Random, hay: list[int], places: range) -> int:
        """Where a stretch begins whose first tokens stand in the hay once."""
        whole = array("L", hay).tobytes()
        for place in rng.sample(places, min(TRIES, len(places))):
            if whole.count(array("L", hay[place : place + BEGINNING]).tobytes()) == 1:
                return place
        raise UserError(
            "the haystack has so few different tokens that no stretch of them in random order is like no other: give "
            "another data.haystack or data.mixture.induction=0"
        )
