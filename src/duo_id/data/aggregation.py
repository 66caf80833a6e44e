"""The aggregation task: what comes up most often in a list that fills the context."""

import random

from duo_id.data.drafting import DraftedTask, Piece

HEAD = "\n\nThis is what the hours brought, line by line. Some of it came back again and again.\n"
ITEM = "\nthe"
LIST_END = "\n\nThat was all. What came most often, as it came first:"
NEXT_ANSWER = ";"
ANSWER_END = ".\n"
TIMES, OTHERS = 6, 4  # how many times more often the frequent come, and how many others there are for each of them


class AggregationTask(DraftedTask):
    """Lines of `answer_words` words, of which `num_questions` come six times as often as all others and are asked for.

    They are listed in the order of their first lines. Aggregation is one of the categories of RULER
    (Hsieh et al. 2024, arXiv 2404.06654): no single place of the context answers.
    """

    def prepare(self) -> None:
        """Tokenise what stands around the words.

        Raises:
            UserError: all lines, as often as they must come, and the answers are longer than a sample.
        """
        self.item, self.list_end, self.next_answer, self.answer_end = map(
            self.tokens, (ITEM, LIST_END, NEXT_ANSWER, ANSWER_END)
        )
        self.head = self.tokens(HEAD)
        count, words = self.settings.num_questions, self.settings.answer_words
        separators = (count - 1) * len(self.next_answer) + len(self.answer_end)
        self.num_fixed = len(self.start) + len(self.head) + len(self.list_end) + separators
        lines = count * (TIMES + OTHERS)
        self.need(
            self.num_fixed + lines * len(self.item) + (lines + count) * words * self.longest_word,
            f"{count} frequent lines of {words} words among {count * OTHERS} others",
            "data.num_questions or data.answer_words",
        )

    def draft(self, rng: random.Random, length: int) -> tuple[list[int], list[Piece]]:
        """As many lines as fit, all as often as they should come but for the last few, and the frequent ones."""
        count = self.settings.num_questions
        told = self.phrases(rng, count * (1 + OTHERS))
        deck = list(range(count)) * TIMES + list(range(count, len(told)))
        room = length - self.num_fixed - sum(map(len, told[:count]))
        lines: list[int] = []
        order = rng.sample(deck, len(deck))
        while (left := room - len(self.item) - len(told[order[-1]])) >= 0:
            room = left
            lines.append(order.pop())
            order = order or rng.sample(deck, len(deck))
        rng.shuffle(lines)
        pieces: list[Piece] = [("question", self.list_end)]
        for place in sorted(range(count), key=lines.index):
            pieces += ("answer", told[place]), ("separator", self.next_answer)
        pieces[-1] = ("separator", self.answer_end)
        listed = [token for line in lines for token in self.item + told[line]]
        return self.start + self.hay(rng, room) + self.head + listed, pieces
