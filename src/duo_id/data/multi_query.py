"""The multi-query task: facts about people are scattered over a haystack, and one question asks for several of them."""

import random
from itertools import product

from duo_id.common.errors import check
from duo_id.data.synthetic import DraftedTask, Piece, scatter
from duo_id.data.words import NAMES, THINGS

HEAD = "A few people are mentioned now and again below. Notice all that is said of them.\n\n"
FACT = "\nThe"
TOPIC = " {thing} of {name}"
FACT_MIDDLE = " is"
FACT_END = ".\n"
TEXT_END = "\n\nNothing more is told. Now answer all at once.\n"
QUESTION = "Say, one after the other, the"
NEXT_TOPIC = ", the"
QUESTION_END = ". Listed in just that order:"
NEXT_ANSWER = ";"
ANSWER_END = ".\n"


class MultiQueryTask(DraftedTask):
    """Facts `The THING of NAME is WORDS.`; one question asks for `num_questions` of them and lists the answers.

    Each thing is stated for two people and asked for one, so that neither the thing nor the name alone is enough. The
    facts asked for are spread over the haystack.
    """

    def prepare(self) -> None:
        """Tokenise all possible facts and questions.

        Raises:
            UserError: it asks for more facts than there are things, or than a sample can hold.
        """
        self.things, self.names = self.part(THINGS), self.part(NAMES)
        count, words = self.settings.num_questions, self.settings.answer_words
        check(
            count <= len(self.things),
            f"data.num_questions={count} must be at most {len(self.things)} with data=multi_query",
        )
        self.topics = {
            (thing, name): self.tokens(TOPIC.format(thing=thing, name=name))
            for thing, name in product(self.things, self.names)
        }
        self.head = self.start + self.tokens(HEAD)
        self.fact, self.fact_middle, self.fact_end, self.text_end = map(
            self.tokens, (FACT, FACT_MIDDLE, FACT_END, TEXT_END)
        )
        self.question, self.next_topic, self.question_end, self.next_answer, self.answer_end = map(
            self.tokens, (QUESTION, NEXT_TOPIC, QUESTION_END, NEXT_ANSWER, ANSWER_END)
        )
        facts = 2 * count * (len(self.fact) + len(self.fact_middle) + len(self.fact_end))
        self.num_fixed = len(self.head) + facts + len(self.text_end)
        lists = (count - 1) * (len(self.next_topic) + len(self.next_answer)) + len(self.answer_end)
        longest = max(map(len, self.topics.values())) + words * self.longest_word
        self.require(
            self.num_fixed + len(self.question) + lists + len(self.question_end) + 3 * count * longest + 2 * count,
            f"{2 * count} facts of {words} words and a question for {count} of them",
            "data.num_questions or data.answer_words",
        )

    def draft(self, rng: random.Random, length: int) -> tuple[list[int], list[Piece]]:
        """Facts in hay, and the question."""
        count = self.settings.num_questions
        things = rng.sample(self.things, count)
        people = [rng.sample(self.names, 2) for _ in things]  # the person in the question, and another one
        topics = [self.topics[thing, pair[who]] for who in (0, 1) for thing, pair in zip(things, people, strict=True)]
        answers = [self.spell(rng.choices(self.words, k=self.settings.answer_words)) for _ in topics]

        asked = rng.sample(range(count), count)
        pieces: list[Piece] = [("question", self._question([topics[number] for number in asked]))]
        for number in asked:
            pieces += ("answer", answers[number]), ("separator", self.next_answer)
        pieces[-1] = ("separator", self.answer_end)

        num_variable = sum(map(len, topics)) + sum(map(len, answers))
        hay = self.hay(rng, length - self.num_fixed - num_variable - sum(len(piece) for _, piece in pieces))
        depths = [*self.depths(rng, count), *self.depths(rng, count)]
        needles = [
            (depth, self.fact + topic + self.fact_middle + answer + self.fact_end)
            for depth, topic, answer in sorted(zip(depths, topics, answers, strict=True))
        ]
        return self.head + scatter(hay, needles) + self.text_end, pieces

    def _question(self, topics: list[list[int]]) -> list[int]:
        tokens = self.question + topics[0]
        for topic in topics[1:]:
            tokens += self.next_topic + topic
        return tokens + self.question_end
