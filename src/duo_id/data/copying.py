"""The copying task: the context is quoted from the beginning of a passage, to be continued word for word."""

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
SPECIMEN = " and then the names of all"  # its number of tokens is that of a quotation's first words
TRIES = 100  # of positions where a passage may start, and of haystacks


class CopyingTask(DraftedTask):
    """Hay, then the first words of `num_questions` of its passages, each followed by its next `answer_tokens` tokens.

    It needs induction heads (Olsson et al. 2022, arXiv 2209.11895) that work over a distance. The passages are spread
    over the hay, where their first words occur once; quotations keep the tokens of the hay.
    """

    def prepare(self) -> None:
        """Tokenise the sentences.

        Raises:
            UserError: the passages and their quotations are longer than a sample, or are all at one depth.
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
        self.require(
            self.num_fixed + math.ceil((2 * self.passage * count + 1) / span),  # twice, for a choice of positions
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
        hay, starts = self._passages(rng, size, parts)
        pieces: list[Piece] = []
        for start in rng.sample(starts, count):
            answer = start + self.quoted
            pieces.append(("question", self.question + hay[start:answer]))
            pieces += ("answer", hay[answer : start + self.passage]), ("separator", self.answer_end)
        return self.head + hay + self.text_end, pieces

    def _passages(self, rng: random.Random, size: int, parts: list[range]) -> tuple[list[int], list[int]]:
        """Hay of this size and the start of a passage in each of its parts; retries if there is none."""
        for _ in range(TRIES):
            hay = self.hay(rng, size)
            text = self._text(hay)
            starts = [start for part in parts if (start := self._passage_start(rng, hay, text, part)) is not None]
            if len(starts) == len(parts):
                return hay, starts
        raise UserError(
            "the haystack repeats itself, so copying finds no passages with a unique beginning: choose another "
            "data.haystack or data.mixture.copying=0"
        )

    def _passage_start(self, rng: random.Random, hay: list[int], text: str, starts: range) -> int | None:
        """The start of a passage whose first tokens occur once in the text, at the start of a word if possible."""
        inside_word = None
        for start in rng.sample(starts, min(TRIES, len(starts))):
            previous = hay[max(start - 1, 0) : start]  # some decoders drop a leading space
            quotation = self._text(previous + hay[start : start + self.quoted])[len(self._text(previous)) :]
            if text.count(quotation) == 1:
                if re.match(r" \w", quotation):
                    return start
                inside_word = start
        return inside_word

    def _text(self, tokens: list[int]) -> str:
        return str(self.tokenizer.decode(tokens, clean_up_tokenization_spaces=False))
