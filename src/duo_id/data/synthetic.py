"""What synthetic tasks share: lengths, words, haystack, and how pieces become a sample."""

import random
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Literal, TypeVar

import torch
from transformers import PreTrainedTokenizerBase

from duo_id.common.errors import UserError, check
from duo_id.data.haystack import Haystack, leading_tokens, load_haystack, tokenize
from duo_id.data.samples import SPLITS, UNSCORED, Sample
from duo_id.data.settings import DataSettings
from duo_id.data.words import WORDS

Piece = tuple[Literal["question", "answer", "separator"], list[int]]  # after the context: kind and tokens
LABELLED = {"answers": ("answer",), "questions": ("question",), "all": ("question", "answer", "separator")}
Filler = TypeVar("Filler")


class DraftedTask(ABC):
    """A task whose samples are assembled from tokens, so that their lengths are exactly the ones drawn.

    Every piece is tokenised separately, so that an answer has the same tokens in the context and after the question.
    """

    def __init__(
        self,
        settings: DataSettings,
        tokenizer: PreTrainedTokenizerBase,
        split: str,
        length_limit: int | None = None,
        haystack: Haystack | None = None,
    ) -> None:
        """Tokenise the fixed pieces and check the settings against the model and the haystack.

        Args:
            settings: of the samples.
            tokenizer: of the model.
            split: train, validation or test; no two share words or haystack.
            length_limit: the model's maximum number of tokens; None: no limit.
            haystack: replaces the one in the settings.

        Raises:
            UserError: samples of the requested lengths cannot be made.
        """
        self.settings, self.tokenizer, self.split = settings, tokenizer, split
        self.lengths = lengths_of(settings, length_limit)
        self.words = self.part(WORDS)
        self.longest_word = max(len(self.spell([word])) for word in self.words)
        self.start = leading_tokens(tokenizer)
        self.prepare()
        self.haystack = haystack or load_haystack(settings.haystack, split)
        self.hay(random.Random(0), self.lengths[-1])  # fail now rather than in the middle of a run
        self.draft(random.Random(0), self.lengths[0])

    @abstractmethod
    def prepare(self) -> None:
        """Tokenise the fixed pieces, and `require` the minimum number of tokens of a sample."""

    @abstractmethod
    def draft(self, rng: random.Random, length: int) -> tuple[list[int], list[Piece]]:
        """The tokens of a sample's context and the pieces that follow it, `length` tokens in all."""

    def sample(self, index: int, seed: int) -> Sample:
        """The sample of this (seed, split, index)."""
        rng = random.Random(f"{seed}:{self.split}:{index}")
        length = rng.choice(self._open_lengths(index))
        tokens, pieces = self.draft(rng, length)
        labels, answer_numbers, answers = [UNSCORED] * len(tokens), [0] * len(tokens), 0
        for kind, piece in pieces:
            answers += kind == "answer"
            tokens += piece
            labels += piece if kind in LABELLED[self.settings.score] else [UNSCORED] * len(piece)
            answer_numbers += [answers if kind == "answer" else 0] * len(piece)
        assert len(tokens) == length
        return Sample(input_ids=torch.tensor(tokens), labels=torch.tensor(labels), answers=torch.tensor(answer_numbers))

    def require(self, tokens: int, contents: str, overrides: str) -> None:
        """Refuse lengths below `tokens`, which `contents` (a plural) need unless settings `overrides` are lowered."""
        check(
            self.lengths[0] >= tokens,
            f"data.length_min={self.settings.length_min} is too short for {contents}, which need {tokens} tokens: "
            f"raise it, or lower {overrides}",
        )

    def part(self, words: Sequence[str]) -> Sequence[str]:
        """The words that only this split uses."""
        return words[SPLITS.index(self.split) :: len(SPLITS)]

    def tokens(self, text: str) -> list[int]:
        """The tokens of a piece of text, tokenised separately."""
        return tokenize(self.tokenizer, text)

    def spell(self, words: Iterable[str]) -> list[int]:
        """The tokens of words, with a space before each."""
        return self.tokens("".join(f" {word}" for word in words))

    def hay(self, rng: random.Random, num_tokens: int) -> list[int]:
        """`num_tokens` tokens from a random position in the split's haystack."""
        return self.haystack.window(rng, num_tokens, self.tokenizer)

    def depths(self, rng: random.Random, count: int) -> list[float]:
        """A random depth in each of `count` equal parts between data.depth_min and data.depth_max, ascending."""
        low, high = self.settings.depth_min, self.settings.depth_max
        return [low + (high - low) * (part + rng.random()) / count for part in range(count)]

    def _open_lengths(self, index: int) -> list[int]:
        """The lengths that a sample may have: all, or those up to the current one of a curriculum."""
        curriculum = self.settings.curriculum if self.split == "train" else 0
        if index >= curriculum:
            return self.lengths
        return self.lengths[: 1 + (len(self.lengths) - 1) * index // curriculum]


def scatter(filler: Sequence[Filler], needles: Iterable[tuple[float, Sequence[Filler]]]) -> list[Filler]:
    """Insert needles into a filler, each at its depth from 0 to 1; the needles must be sorted by depth."""
    combined: list[Filler] = []
    previous = 0
    for depth, needle in needles:
        cut = round(depth * len(filler))
        combined += [*filler[previous:cut], *needle]
        previous = cut
    return [*combined, *filler[previous:]]


def lengths_of(settings: DataSettings, limit: int | None) -> list[int]:
    """The lengths to draw from: ascending, evenly spaced, both ends included (a single one is the shortest)."""
    longest = settings.length_max or limit
    if longest is None:
        raise UserError("the model has no limit of its context: set data.length_max")
    check(
        limit is None or longest <= limit,
        f"data.length_max={longest} exceeds the {limit} tokens that the model takes: lower it",
    )
    check(
        settings.length_min <= longest,
        f"data.length_min={settings.length_min} exceeds the {longest} tokens that the model takes: lower it",
    )
    steps = max(settings.num_lengths - 1, 1)
    span = longest - settings.length_min
    return [settings.length_min + round(span * step / steps) for step in range(settings.num_lengths)]
