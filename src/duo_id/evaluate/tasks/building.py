"""Build contexts and questions from tokens: lengths are exact, and answers keep exactly the tokens inserted."""

import math
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice

from transformers import PreTrainedTokenizerBase

from duo_id.common.errors import check
from duo_id.data.chat import Chat
from duo_id.data.haystack import Haystack, tokenize
from duo_id.evaluate.items import Question
from duo_id.evaluate.tasks.words import VOCABULARIES, Vocabulary

LINE, BLANK_LINE = "\n", "\n\n"
SPECIMEN = "What does the message about the rusty lantern say? Diana told me that it came from Helsinki."
CHARACTERS = 4  # per token of such text, for an ordinary tokenizer
SPARE = 400  # tokens of haystack read beyond the hay
WORD = 20  # tokens; no word is longer

TaskSample = tuple[list[int], list[Question]]  # the tokens of the context, and its questions


class TooShort(Exception):
    """The context is too short for its task, which needs at least `needed` tokens, or slightly more."""

    def __init__(self, needed: int) -> None:
        super().__init__(f"needs {needed} tokens")
        self.needed = needed


@dataclass(frozen=True)
class SampleBuilder:
    """What all samples of an evaluation share.

    Attributes:
        tokenizer: of the model.
        haystack: of the split.
        split: development or test.
        chat: the tokens around context and question.
    """

    tokenizer: PreTrainedTokenizerBase
    haystack: Haystack
    split: str
    chat: Chat

    @property
    def words(self) -> Vocabulary:
        """The split's vocabulary."""
        return VOCABULARIES[self.split]

    def tokens(self, text: str) -> list[int]:
        """The tokens of a piece of text, tokenized on its own."""
        return tokenize(self.tokenizer, text)

    def text(self, tokens: Sequence[int]) -> str:
        """The text of tokens, with its spaces unchanged."""
        return str(self.tokenizer.decode(list(tokens), clean_up_tokenization_spaces=False))

    def comma_separated(self, words: Sequence[str]) -> list[int]:
        """The tokens of a space, then the words separated by commas."""
        return self.tokens(f" {', '.join(words)}")

    def scaled(self, tokens: int) -> int:
        """A count of an ordinary tokenizer's tokens, converted to this one's if it splits text more finely."""
        return math.ceil(tokens * self._scale)

    @cached_property
    def _scale(self) -> float:
        return max(1.0, len(self.tokens(SPECIMEN)) * CHARACTERS / len(SPECIMEN))


@dataclass
class Draft:
    """One sample under construction.

    Attributes:
        builder: what it shares with all others.
        rng: its source of randomness.
        size: tokens of the context.
        depths: number of needles, for tasks over a grid of depths.
    """

    builder: SampleBuilder
    rng: random.Random
    size: int
    depths: int

    @cached_property
    def _window(self) -> list[int]:
        length = self.size + self.builder.scaled(SPARE)
        return self.builder.haystack.window(self.rng, length, self.builder.tokenizer)

    @property
    def hay(self) -> list[int]:
        """Haystack text as long as the whole context, to be cut as needed."""
        return self._window[: self.size]

    @property
    def spare(self) -> list[int]:
        """The haystack text after the hay."""
        return self._window[self.size :]

    @cached_property
    def _hay_text(self) -> str:
        return " ".join(self.builder.text(self.hay).lower().split())

    def contains(self, text: str) -> bool:
        """Whether the hay contains a text, ignoring case and line breaks."""
        return text.lower() in self._hay_text

    def not_in_hay(self, candidates: Iterable[str], count: int) -> list[str]:
        """The first `count` candidates that the hay does not contain, so that each occurs in the context once.

        Raises:
            UserError: there are fewer.
        """
        unused = list(islice((text for text in candidates if not self.contains(text)), count))
        check(
            len(unused) == count,
            f"a context needs {count} names that its haystack does not contain, but there are only {len(unused)}: "
            "lower depths or choose another data.haystack",
        )
        return unused

    def numbers(self, count: int, digits: int = 6) -> list[str]:
        """`count` different numbers that the hay does not contain."""
        drawn = self.rng.sample(range(10 ** (digits - 1), 10**digits), 3 * count)
        return self.not_in_hay(map(str, drawn), count)

    def shuffled(self, words: Sequence[str]) -> list[str]:
        """All the words in random order."""
        return self.rng.sample(words, len(words))

    def scatter(self, head: str, needles: Iterable[tuple[float, list[int]]]) -> list[int]:
        """A context of hay with needles in it.

        Args:
            head: text in front of the hay.
            needles: depth in the hay, from 0 to 1, and tokens of each. They are inserted between words, those of equal
                depth in the given order.

        Raises:
            TooShort: there is no room left for hay.
        """
        needles = sorted(needles, key=lambda needle: needle[0])
        context = [*self.builder.chat.before, *self.builder.tokens(head)]
        room = self.size - len(context) - sum(len(needle) for _, needle in needles)
        if room < len(needles):
            raise TooShort(self.size - room + len(needles))
        hay, begin = self.hay[:room], 0
        for depth, needle in needles:
            cut = max(begin, self._between_words(hay, round(depth * room)))
            context += hay[begin:cut] + needle
            begin = cut
        return context + hay[begin:]

    def fill(
        self, head: str, entries: Iterable[list[int]], tail: str = "", least: int = 1, apart: Iterable[str] = ()
    ) -> tuple[list[int], int]:
        """A context of as many entries as fit, after a little hay that fills the remaining tokens.

        Args:
            head: text before the entries.
            entries: tokens of each; more than fit, possibly infinite.
            tail: text after them.
            least: how many must fit.
            apart: words that the hay in front must not contain.

        Returns:
            the context and the number of entries in it.

        Raises:
            TooShort: fewer than `least` entries fit.
        """
        chat_tokens = self.builder.chat.before
        head_tokens, tail_tokens = self.builder.tokens(BLANK_LINE + head), self.builder.tokens(tail)
        space = self.space(head, tail)
        body: list[int] = []
        count = 0
        for entry in entries:
            if len(body) + len(entry) > space:
                if count < least:
                    longest = len(body) + (least - count) * len(entry)
                    raise TooShort(self.size - space + longest)
                break
            body += entry
            count += 1
        return [*chat_tokens, *self._front(space + 1 - len(body), set(apart)), *head_tokens, *body, *tail_tokens], count

    def space(self, head: str, tail: str = "") -> int:
        """Tokens that `fill` has for entries, after head, tail, a blank line and one token of hay."""
        fixed = self.builder.tokens(BLANK_LINE + head), self.builder.tokens(tail), self.builder.chat.before
        return self.size - sum(map(len, fixed)) - 1

    def question(
        self,
        text: str,
        beginning: str,
        answer: Sequence[int],
        references: Sequence[str],
        depth: float | None = None,
    ) -> Question:
        """A question that follows the context.

        Args:
            text: of the question.
            beginning: of the answer, which the model continues.
            answer: tokens of the continuation.
            references: what a generated answer is judged against.
            depth: of the answer in the context.
        """
        tokens, after = self.builder.tokens, self.builder.chat.after
        prompt = [*tokens(BLANK_LINE + text), *(after or tokens(LINE)), *tokens(beginning)]
        return Question(tuple(prompt), tuple(answer), tuple(references), depth)

    def _front(self, count: int, apart: set[str]) -> list[int]:
        """`count` tokens of hay with none of the words in `apart`, if 100 attempts find them."""
        for _ in range(100):
            hay = self.builder.haystack.window(self.rng, count, self.builder.tokenizer)
            if apart.isdisjoint(self.builder.text(hay).lower().split()):
                break
        return hay

    def _between_words(self, hay: list[int], cut: int) -> int:
        """The last index at or shortly before `cut` whose token starts with whitespace; `cut` itself at the ends."""
        candidates = range(cut, max(cut - WORD, 0), -1) if cut < len(hay) else ()
        return next((index for index in candidates if self.builder.text([hay[index]])[:1].isspace()), cut)


def evenly_spaced(count: int) -> list[float]:
    """`count` depths from 0 to 1; a single one is in the middle."""
    return [step / (count - 1) for step in range(count)] if count > 1 else [0.5]


def one_index_per_part(rng: random.Random, size: int, parts: int) -> list[int]:
    """A random index of each of `parts` equal parts of `size` entries, ascending."""
    assert size >= parts
    return [rng.randrange(part * size // parts, (part + 1) * size // parts) for part in range(parts)]
