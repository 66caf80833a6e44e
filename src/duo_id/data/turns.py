"""The turns task: questions of several kinds one after another over one context, each answered before the next."""

import random
from itertools import product

from duo_id.common.errors import check
from duo_id.data import key_value, multi_query, passkey
from duo_id.data.synthetic import DraftedTask, Piece, scatter
from duo_id.data.words import MAX_ORDINAL, NAMES, THINGS, ordinal

HEAD = "This text holds passkeys, entries of an index and facts about people. Several questions about them follow.\n\n"
TEXT_END = "\n\nThat was the text. Here are the questions.\n"
FACT_QUESTION = "What is the{topic}? The{topic} is"
ANSWER_END = "\n"
KINDS = 3  # passkeys, entries, facts: they take turns
KEY_WORDS = 2

Told = tuple[list[int], list[int], list[int]]  # what the context says, the question, and its answer


class TurnsTask(DraftedTask):
    """Passkeys, index entries and facts in one haystack, and `num_turns` questions about them in random order.

    Sentences are those of the passkey, key-value and multi-query tasks. What is asked for is spread over the haystack;
    between it stand as many entries and facts that nobody asks for, of other keys and of other people.
    """

    def prepare(self) -> None:
        """Tokenise all that is told and asked.

        Raises:
            UserError: there are more turns than things or ordinals, or than a sample can hold.
        """
        settings, turns = self.settings, self.settings.num_turns
        self.things, self.names = self.part(THINGS), self.part(NAMES)
        most = KINDS * min(len(self.things), MAX_ORDINAL)
        check(turns <= most, f"data.num_turns={turns} must be at most {most}")
        self.head, self.text_end = self.start + self.tokens(HEAD), self.tokens(TEXT_END)
        self.needle_end, self.entry, self.colon, self.entry_question, self.fact, self.fact_middle, self.fact_end = map(
            self.tokens,
            (
                passkey.NEEDLE_END,
                key_value.ENTRY,
                key_value.COLON,
                key_value.QUESTION,
                multi_query.FACT,
                multi_query.FACT_MIDDLE,
                multi_query.FACT_END,
            ),
        )
        self.answer_end = self.tokens(ANSWER_END)
        names = [ordinal(number) for number in range(1, -(-turns // KINDS) + 1)]
        self.passkeys = [
            (self.tokens(passkey.NEEDLE.format(ordinal=name)), self.tokens(passkey.QUESTION.format(ordinal=name)))
            for name in names
        ]
        topics = [multi_query.TOPIC.format(thing=thing, name=name) for thing, name in product(self.things, self.names)]
        asked = [FACT_QUESTION.format(topic=topic) for topic in topics]
        pairs = zip(map(self.tokens, topics), map(self.tokens, asked), strict=True)
        self.topics = dict(zip(product(self.things, self.names), pairs, strict=True))
        self.num_fixed = len(self.head) + len(self.text_end) + turns * len(self.answer_end)
        self.require(
            self.num_fixed + sum(self._longest(number % KINDS) for number in range(turns)) + 2 * turns,
            f"{turns} turns with answers of {settings.passkey_words} and {settings.answer_words} words",
            "data.num_turns, data.passkey_words or data.answer_words",
        )

    def _longest(self, kind: int) -> int:
        """Tokens that a turn of a kind takes at most, in the context and after it."""
        word, settings = self.longest_word, self.settings
        if kind == 0:
            return (
                max(len(needle) + len(asked) for needle, asked in self.passkeys)
                + len(self.needle_end)
                + (2 * settings.passkey_words * word)
            )
        answers, key = 3 * settings.answer_words * word, KEY_WORDS * word
        if kind == 1:
            told = 2 * (len(self.entry) + len(self.answer_end))
            return told + len(self.entry_question) + 3 * (len(self.colon) + key) + answers
        told = 2 * (len(self.fact) + len(self.fact_middle) + len(self.fact_end))
        return told + max(2 * len(topic) + len(asked) for topic, asked in self.topics.values()) + answers

    def draft(self, rng: random.Random, length: int) -> tuple[list[int], list[Piece]]:
        """Hay with all that is told, and the turns."""
        counts = [(self.settings.num_turns + KINDS - 1 - kind) // KINDS for kind in range(KINDS)]
        entries, facts = self._entries(rng, 2 * counts[1]), self._facts(rng, counts[2])
        asked = [*self._passkeys(rng, counts[0]), *entries[: counts[1]], *facts[: counts[2]]]
        others = [told for told, _, _ in (*entries[counts[1] :], *facts[counts[2] :])]
        pieces: list[Piece] = []
        for _, question, answer in rng.sample(asked, len(asked)):
            pieces += ("question", question), ("answer", answer), ("separator", self.answer_end)
        needles = [told for told, _, _ in rng.sample(asked, len(asked))]
        room = length - len(self.head) - len(self.text_end) - sum(len(piece) for _, piece in pieces)
        hay = self.hay(rng, room - sum(map(len, (*needles, *others))))
        rng.shuffle(others)
        depths = [*self.depths(rng, len(needles)), *self.depths(rng, len(others))]
        return self.head + scatter(hay, sorted(zip(depths, [*needles, *others], strict=True))) + self.text_end, pieces

    def _passkeys(self, rng: random.Random, count: int) -> list[Told]:
        told = []
        for needle, question in self.passkeys[:count]:
            answer = self.spell(rng.choices(self.words, k=self.settings.passkey_words))
            told.append((needle + answer + self.needle_end, question, answer))
        return told

    def _entries(self, rng: random.Random, count: int) -> list[Told]:
        """Entries of different keys."""
        told, base = [], len(self.words)
        for number in rng.sample(range(base**KEY_WORDS), count):
            key = self.spell([self.words[number // base], self.words[number % base]]) + self.colon
            answer = self._answer(rng)
            told.append((self.entry + key + answer + self.answer_end, self.entry_question + key, answer))
        return told

    def _facts(self, rng: random.Random, count: int) -> list[Told]:
        """Facts about different things, then facts about the same things of other people."""
        things = rng.sample(self.things, count)
        people = [rng.sample(self.names, 2) for _ in things]
        told = []
        for who in (0, 1):
            for thing, pair in zip(things, people, strict=True):
                (topic, question), answer = self.topics[thing, pair[who]], self._answer(rng)
                told.append((self.fact + topic + self.fact_middle + answer + self.fact_end, question, answer))
        return told

    def _answer(self, rng: random.Random) -> list[int]:
        return self.spell(rng.choices(self.words, k=self.settings.answer_words))
