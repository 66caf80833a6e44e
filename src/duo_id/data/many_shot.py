"""The many-shot task: what belongs together is learned from examples that fill the context."""

import random

from duo_id.data.drafting import DraftedTask, Piece

HEAD = "\n\nCards with words on them are laid on piles. Learn from these cards what goes where.\n\n"
CARD = "Card with"
PILE = " goes to"
CARDS_END = "\nNow go on with other cards.\n\n"
CARD_END = "\n"
PILES, KINDS, SHOWN = 4, 6, 3  # piles, words whose cards go to a pile, and words on a card
SEEN = 3  # cards of each pile that are shown at least


class ManyShotTask(DraftedTask):
    """Cards `Card with WORDS goes to PILE`, then `num_questions` cards whose pile is asked for.

    In-context learning with many examples (Bertsch et al. 2024, arXiv 2405.00200): the words of a card are of one of
    four groups, which only the examples tell apart, and its pile is `answer_words` words that mean nothing.
    """

    def prepare(self) -> None:
        """Tokenise what stands around the words.

        Raises:
            UserError: the cards asked about, and a few of each pile, are longer than a sample.
        """
        self.head, self.card, self.pile, self.cards_end, self.card_end = map(
            self.tokens, (HEAD, CARD, PILE, CARDS_END, CARD_END)
        )
        count, words = self.settings.num_questions, self.settings.answer_words
        self.num_fixed = len(self.start) + len(self.head) + len(self.cards_end)
        longest = len(self.card) + len(self.pile) + len(self.card_end) + (SHOWN + words) * self.longest_word
        self.need(
            self.num_fixed + (count + SEEN * PILES) * longest,
            f"{count} questions about piles of {words} words and {SEEN} examples of each",
            "data.num_questions or data.answer_words",
        )

    def draft(self, rng: random.Random, length: int) -> tuple[list[int], list[Piece]]:
        """As many cards as fit, one of each pile in random order again and again, and the questions."""
        known = rng.sample(self.words, PILES * KINDS)
        groups = [known[pile::PILES] for pile in range(PILES)]
        piles = self.phrases(rng, PILES)
        pieces: list[Piece] = []
        for _ in range(self.settings.num_questions):
            place = rng.randrange(PILES)
            pieces.append(("question", self._card(rng, groups[place])))
            pieces += ("answer", piles[place]), ("separator", self.card_end)
        room = length - self.num_fixed - sum(len(piece) for _, piece in pieces)
        cards: list[int] = []
        order: list[int] = []
        while True:
            order = order or rng.sample(range(PILES), PILES)
            place = order.pop()
            card = self._card(rng, groups[place]) + piles[place] + self.card_end
            if len(cards) + len(card) > room:
                break
            cards += card
        return self.start + self.hay(rng, room - len(cards)) + self.head + cards + self.cards_end, pieces

    def _card(self, rng: random.Random, group: list[str]) -> list[int]:
        return self.card + self.spell(rng.sample(group, SHOWN)) + self.pile
