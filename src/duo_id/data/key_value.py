"""The key-value task: an index of entries fills the context, and some of them are looked up."""

import math
import random

from duo_id.data.synthetic import DraftedTask, Piece, scatter

HEAD = "\n\nHere is an index. Mind every entry, since a few are looked up at the end.\n"
ENTRY = "\nEntry"
COLON = ":"
INDEX_END = "\n\nThe index ends here. Now look entries up.\n"
QUESTION = "Look up entry"
ANSWER_END = "\n"


class KeyValueTask(DraftedTask):
    """Entries `Entry KEY: VALUE`, no key twice, `num_questions` of which are asked for in random order.

    A key has as many words as it takes for enough distinct keys; a value has `answer_words` words. The entries asked
    for are spread over the index, and hay in front of it fills the tokens that are left over.
    """

    def prepare(self) -> None:
        """Tokenise the text around keys and values.

        Raises:
            UserError: the entries asked for and their questions are longer than a sample.
        """
        self.head, self.entry, self.colon, self.index_end, self.question, self.answer_end = map(
            self.tokens, (HEAD, ENTRY, COLON, INDEX_END, QUESTION, ANSWER_END)
        )
        self.key_words = math.ceil(math.log(self.lengths[-1], len(self.words)))  # enough for one key per token
        count, words = self.settings.num_questions, self.settings.answer_words
        self.num_fixed = len(self.start) + len(self.head) + len(self.index_end)
        per_entry = len(self.entry) + len(self.question) + 2 * len(self.colon) + len(self.answer_end)
        self.require(
            self.num_fixed + count * (per_entry + 2 * (self.key_words + words) * self.longest_word),
            f"{count} entries of {words} words and their questions",
            "data.num_questions or data.answer_words",
        )

    def draft(self, rng: random.Random, length: int) -> tuple[list[int], list[Piece]]:
        """As many entries as fit, and the questions."""
        count, used_keys = self.settings.num_questions, set[tuple[str, ...]]()
        keys = [self._key(rng, used_keys) for _ in range(count)]
        values = [self._value(rng) for _ in range(count)]
        pieces: list[Piece] = []
        for index in rng.sample(range(count), count):
            pieces.append(("question", self.question + keys[index] + self.colon))
            pieces += ("answer", values[index]), ("separator", self.answer_end)
        asked_entries = [self._entry(key, value) for key, value in zip(keys, values, strict=True)]
        room = length - self.num_fixed - sum(map(len, asked_entries)) - sum(len(piece) for _, piece in pieces)
        others: list[list[int]] = []
        while len(entry := self._entry(self._key(rng, used_keys), self._value(rng))) <= room:
            others.append(entry)
            room -= len(entry)
        entries = scatter(
            others, [(depth, [entry]) for depth, entry in zip(self.depths(rng, count), asked_entries, strict=True)]
        )
        context = self.start + self.hay(rng, room) + self.head
        return context + [token for entry in entries for token in entry] + self.index_end, pieces

    def _key(self, rng: random.Random, used_keys: set[tuple[str, ...]]) -> list[int]:
        """The tokens of a new key, which is added to `used_keys`."""
        while (words := tuple(rng.choices(self.words, k=self.key_words))) in used_keys:
            pass
        used_keys.add(words)
        return self.spell(words)

    def _value(self, rng: random.Random) -> list[int]:
        return self.spell(rng.choices(self.words, k=self.settings.answer_words))

    def _entry(self, key: list[int], value: list[int]) -> list[int]:
        return self.entry + key + self.colon + value
