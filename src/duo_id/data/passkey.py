"""The passkey task: word sequences hidden in a haystack and asked for again."""

import random
from itertools import chain

from duo_id.common.errors import check
from duo_id.data.synthetic import DraftedTask, Piece, scatter
from duo_id.data.words import MAX_ORDINAL, ordinal

INTRODUCTION = "Passkeys are hidden in the text below. Read it and keep each of them in mind.\n\n"
NEEDLE = "\nRemember: the {ordinal} passkey is:"
NEEDLE_END = ".\n"
TEXT_END = "\n\nThe text ends here. Now recall the passkeys.\n"
QUESTION = "What is the {ordinal} passkey? The {ordinal} passkey is:"
ANSWER_END = "\n"


class PasskeyTask(DraftedTask):
    """`num_passkeys` sequences of `passkey_words` words at random depths, each asked for once, in random order.

    DuoAttention's synthetic task (arXiv 2410.10819, section 2.2), with words and sentences of our own.
    """

    def prepare(self) -> None:
        """Tokenise the sentences.

        Raises:
            UserError: there are more passkeys than ordinals, or than fit into the length.
        """
        count, words = self.settings.num_passkeys, self.settings.passkey_words
        check(1 <= count <= MAX_ORDINAL, f"data.num_passkeys={count} must be between 1 and {MAX_ORDINAL}")
        self.head = self.start + self.tokens(INTRODUCTION)
        ordinals = [ordinal(number) for number in range(1, count + 1)]
        self.needles = [self.tokens(NEEDLE.format(ordinal=name)) for name in ordinals]
        self.questions = [self.tokens(QUESTION.format(ordinal=name)) for name in ordinals]
        self.needle_end, self.text_end, self.answer_end = map(self.tokens, (NEEDLE_END, TEXT_END, ANSWER_END))
        ends = count * (len(self.needle_end) + len(self.answer_end))
        sentences = sum(map(len, chain(self.needles, self.questions)))
        self.num_fixed = len(self.head) + len(self.text_end) + ends + sentences
        self.require(
            self.num_fixed + 2 * count * words * self.longest_word + count,
            f"{count} passkeys of {words} words and their questions",
            "data.num_passkeys or data.passkey_words",
        )

    def draft(self, rng: random.Random, length: int) -> tuple[list[int], list[Piece]]:
        """Passkeys in hay, and their questions."""
        count = self.settings.num_passkeys
        answers = [self.spell(rng.choices(self.words, k=self.settings.passkey_words)) for _ in range(count)]
        depths = [rng.uniform(self.settings.depth_min, self.settings.depth_max) for _ in range(count)]
        asked = rng.sample(range(count), count)
        hay = self.hay(rng, length - self.num_fixed - 2 * sum(map(len, answers)))

        needles = [
            (depth, self.needles[passkey] + answers[passkey] + self.needle_end)
            for depth, passkey in sorted(zip(depths, range(count), strict=True))
        ]
        pieces: list[Piece] = []
        for passkey in asked:
            pieces += (
                ("question", self.questions[passkey]),
                ("answer", answers[passkey]),
                ("separator", self.answer_end),
            )
        return self.head + scatter(hay, needles) + self.text_end, pieces
