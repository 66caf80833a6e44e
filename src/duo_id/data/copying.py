"""The copying task: the beginnings of passages of the context are quoted, and quoting goes on word for word."""

import math
import random
import re
from itertools import pairwise

from duo_id.common.errors import UserError, check
from duo_id.data.synthetic import DraftedTask, Piece

HEAD = "Read these pages with care: parts of them have to be quoted afterwards.\n\n"
TEXT_END = "\n\nThese were the pages. Quotations from them follow.\n"
QUESTION = "\nQuotation:"
ANSWER_END = "\n"
SPECIMEN = " and then the names of all"  # has as many words as are quoted
TRIES = 100  # places where a passage may begin that are looked at, and stretches of hay


class CopyingTask(DraftedTask):
    """Hay, then the first words of `num_questions` of its passages, each followed by its next `answer_tokens` tokens.

    What induction heads do (Olsson et al. 2022, arXiv 2209.11895), over a distance. The passages are spread over the
    hay and their first words stand in it once; quotations keep the tokens of the hay.
    """

    def prepare(self) -> None:
        """Tokenise the sentences.

        Raises:
            UserError: the passages and their quotations are longer than a sample, or all at one depth.
        """
        settings, count = self.settings, self.settings.num_questions
        self.head = self.start + self.tokens(HEAD)
        self.text_end, self.question, self.answer_end = map(self.tokens, (TEXT_END, QUESTION, ANSWER_END))
        self.quoted = len(self.tokens(SPECIMEN))
        self.passage = self.quoted + settings.answer_tokens  # tokens
        questions = count * (len(self.question) + self.passage + len(self.answer_end))
        self.num_fixed = len(self.head) + len(self.text_end) + questions
        span = settings.depth_max - settings.depth_min
        check(span > 0, f"data.depth_max={settings.depth_max} must exceed data.depth_min: passages need room")
        self.need(
            self.num_fixed + math.ceil((2 * self.passage * count + 1) / span),  # twice, for a choice of places
            f"{count} passages with {settings.answer_tokens} tokens to copy",
            "data.num_questions or data.answer_tokens",
        )

    def draft(self, rng: random.Random, length: int) -> tuple[list[int], list[Piece]]:
        """Hay, and quotations from it in random order.

        Raises:
            UserError: the haystack repeats itself too much.
        """
        count = self.settings.num_questions
        size = length - self.num_fixed
        first, last = (round(depth * size) for depth in (self.settings.depth_min, self.settings.depth_max))
        ends = [first + (last - first) * part // count for part in range(count + 1)]
        parts = [range(begin, end - self.passage + 1) for begin, end in pairwise(ends)]
        hay, places = self._passages(rng, size, parts)
        pieces: list[Piece] = []
        for place in rng.sample(places, count):
            answer = place + self.quoted
            pieces.append(("question", self.question + hay[place:answer]))
            pieces += ("answer", hay[answer : place + self.passage]), ("separator", self.answer_end)
        return self.head + hay + self.text_end, pieces

    def _passages(self, rng: random.Random, size: int, parts: list[range]) -> tuple[list[int], list[int]]:
        """So much hay, and a place in each of its parts where a passage begins; hay without them is passed over."""
        for _ in range(TRIES):
            hay = self.hay(rng, size)
            text = self._text(hay)
            places = [place for part in parts if (place := self._place(rng, hay, text, part)) is not None]
            if len(places) == len(parts):
                return hay, places
        raise UserError(
            "the haystack repeats itself, copying finds no passages that begin like no other: give another "
            "data.haystack or data.mixture.copying=0"
        )

    def _place(self, rng: random.Random, hay: list[int], text: str, places: range) -> int | None:
        """Where a passage begins whose first tokens stand in the text once: if possible, where a word begins."""
        found = None
        for place in rng.sample(places, min(TRIES, len(places))):
            before = hay[max(place - 1, 0) : place]  # some decoders drop the space in front of all
            beginning = self._text(before + hay[place : place + self.quoted])[len(self._text(before)) :]
            if text.count(beginning) == 1:
                if re.match(r" \w", beginning):
                    return place
                found = place
        return found

    def _text(self, tokens: list[int]) -> str:
        return str(self.tokenizer.decode(tokens, clean_up_tokenization_spaces=False))
