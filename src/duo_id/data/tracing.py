"""The tracing task: a way is followed from place to place, whose signposts are scattered in a haystack."""

import random
from itertools import pairwise

from duo_id.data.drafting import DraftedTask, Piece, scatter

HEAD = "Signposts stand in these pages. Remember where each of them leads.\n\n"
SIGN = "\nFrom"
LEADS = " one comes to"
SIGN_END = ".\n"
TEXT_END = "\n\nNo more signs. Now walk.\nThe way from"
QUESTION_END = " leads past"
NEXT_ANSWER = ","
ANSWER_END = ".\n"
WAYS = 2  # one of them is asked for


class TracingTask(DraftedTask):
    """Statements `From PLACE one comes to PLACE.`; the question is a way's beginning, the answer its next places.

    A place is `answer_words` words, a way has `num_questions` hops, and a second way as long is told beside it.
    Multi-hop tracing is the second of RULER's categories (Hsieh et al. 2024, arXiv 2404.06654).
    """

    def prepare(self) -> None:
        """Tokenise what stands around the places.

        Raises:
            UserError: the signs and the answer are longer than a sample.
        """
        self.head = self.start + self.tokens(HEAD)
        self.sign, self.leads, self.sign_end, self.text_end, self.question_end, self.next_answer, self.answer_end = map(
            self.tokens, (SIGN, LEADS, SIGN_END, TEXT_END, QUESTION_END, NEXT_ANSWER, ANSWER_END)
        )
        hops, words = self.settings.num_questions, self.settings.answer_words
        around = WAYS * hops * (len(self.sign) + len(self.leads) + len(self.sign_end))
        separators = (hops - 1) * len(self.next_answer) + len(self.answer_end)
        self.num_fixed = len(self.head) + around + len(self.text_end) + len(self.question_end) + separators
        places = (2 * WAYS * hops + hops + 1) * words * self.longest_word
        self.need(
            self.num_fixed + places + 2 * WAYS * hops,
            f"{WAYS} ways of {hops} hops between places of {words} words",
            "data.num_questions or data.answer_words",
        )

    def draft(self, rng: random.Random, length: int) -> tuple[list[int], list[Piece]]:
        """Signs in hay in random order, and the way."""
        hops = self.settings.num_questions
        places = self.phrases(rng, WAYS * (hops + 1))
        ways = [places[way::WAYS] for way in range(WAYS)]
        signs = [self._sign(*ends) for way in ways for ends in pairwise(way)]
        start, *way = ways[0]
        pieces: list[Piece] = [("question", self.text_end + start + self.question_end)]
        for place in way:
            pieces += ("answer", place), ("separator", self.next_answer)
        pieces[-1] = ("separator", self.answer_end)
        told = sum(map(len, signs)) + len(self.head) + sum(len(piece) for _, piece in pieces)
        depths = self.depths(rng, len(signs))
        needles = zip(depths, rng.sample(signs, len(signs)), strict=True)
        return self.head + scatter(self.hay(rng, length - told), needles), pieces

    def _sign(self, begin: list[int], end: list[int]) -> list[int]:
        return self.sign + begin + self.leads + end + self.sign_end
