"""The passkey task, and the one place where tasks are named."""

import random
from itertools import chain

import torch
from transformers import PreTrainedTokenizerBase

from duo_id.config import DataSettings, require
from duo_id.data.disk import DiskTask
from duo_id.data.haystack import Haystack, leading_tokens, load_haystack, tokenize
from duo_id.data.samples import SPLITS, UNSCORED, Sample, Task
from duo_id.data.words import MAX_ORDINAL, WORDS, ordinal
from duo_id.errors import UserError

INTRODUCTION = "Passkeys are hidden in the text below. Read it and keep each of them in mind.\n\n"
NEEDLE = "\nRemember: the {ordinal} passkey is:"
NEEDLE_END = ".\n"
TEXT_END = "\n\nThe text ends here. Now recall the passkeys.\n"
QUESTION = "What is the {ordinal} passkey? The {ordinal} passkey is:"
ANSWER_END = "\n"


class PasskeyTask:
    """Word sequences hidden at random depths of a haystack, then each asked for once, in random order.

    DuoAttention's synthetic task (arXiv 2410.10819, section 2.2), with words and sentences of our own. Every piece is
    tokenised on its own and samples are put together from tokens: the length drawn is the sample's exact length, and
    an answer's tokens are those of its needle.
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
            length_limit: the most tokens that the model takes; None: it names no limit.
            haystack: instead of the one that the settings name.

        Raises:
            UserError: samples of the wanted lengths cannot be made.
        """
        self.settings, self.tokenizer, self.split = settings, tokenizer, split
        count = settings.num_passkeys
        require(1 <= count <= MAX_ORDINAL, f"data.num_passkeys={count} must be between 1 and {MAX_ORDINAL}")
        self.lengths = _lengths(settings, length_limit)
        self.words = WORDS[SPLITS.index(split) :: len(SPLITS)]

        self.head = leading_tokens(tokenizer) + tokenize(tokenizer, INTRODUCTION)
        ordinals = [ordinal(number) for number in range(1, count + 1)]
        self.needles = [tokenize(tokenizer, NEEDLE.format(ordinal=name)) for name in ordinals]
        self.questions = [tokenize(tokenizer, QUESTION.format(ordinal=name)) for name in ordinals]
        self.needle_end, self.text_end, self.answer_end = (
            tokenize(tokenizer, piece) for piece in (NEEDLE_END, TEXT_END, ANSWER_END)
        )
        longest_word = max(len(tokenize(tokenizer, f" {word}")) for word in self.words)
        needed = self._num_fixed() + 2 * count * settings.passkey_words * longest_word + count
        require(
            self.lengths[0] >= needed,
            f"data.length_min={settings.length_min} is too short for {count} passkeys of {settings.passkey_words} "
            f"words and their questions, which need {needed} tokens: raise it, or lower data.num_passkeys or "
            "data.passkey_words",
        )
        self.haystack = haystack or load_haystack(settings.haystack, split)
        self.haystack.window(random.Random(0), self.lengths[-1], tokenizer)  # fails now rather than in mid-run

    def sample(self, index: int, seed: int) -> Sample:
        """The sample of this (seed, split, index)."""
        rng = random.Random(f"{seed}:{self.split}:{index}")
        count = self.settings.num_passkeys
        length = rng.choice(self.lengths)
        answers = [self._answer(rng) for _ in range(count)]
        depths = [rng.uniform(self.settings.depth_min, self.settings.depth_max) for _ in range(count)]
        asked = rng.sample(range(count), count)
        num_hay = length - self._num_fixed() - 2 * sum(map(len, answers))
        hay = self.haystack.window(rng, num_hay, self.tokenizer)

        tokens = list(self.head)
        begin = 0
        for depth, passkey in sorted(zip(depths, range(count), strict=True)):
            cut = round(depth * num_hay)
            tokens += hay[begin:cut] + self.needles[passkey] + answers[passkey] + self.needle_end
            begin = cut
        tokens += hay[begin:] + self.text_end
        labels, places = [UNSCORED] * len(tokens), [0] * len(tokens)
        for turn, passkey in enumerate(asked, start=1):
            for piece, place in ((self.questions[passkey], 0), (answers[passkey], turn), (self.answer_end, 0)):
                tokens += piece
                labels += piece if place or self.settings.score_questions else [UNSCORED] * len(piece)
                places += [place] * len(piece)
        return Sample(input_ids=torch.tensor(tokens), labels=torch.tensor(labels), answers=torch.tensor(places))

    def _answer(self, rng: random.Random) -> list[int]:
        words = rng.choices(self.words, k=self.settings.passkey_words)
        return tokenize(self.tokenizer, "".join(f" {word}" for word in words))

    def _num_fixed(self) -> int:
        """Tokens of a sample that are neither haystack nor passkey words."""
        ends = len(self.needles) * (len(self.needle_end) + len(self.answer_end))
        return len(self.head) + len(self.text_end) + ends + sum(map(len, chain(self.needles, self.questions)))


def _lengths(settings: DataSettings, limit: int | None) -> list[int]:
    """The lengths to draw from, ascending, evenly spaced, both ends included (a single one is the shortest)."""
    longest = settings.length_max or limit
    if longest is None:
        raise UserError("the model names no limit of its context: give data.length_max")
    require(
        limit is None or longest <= limit,
        f"data.length_max={longest} exceeds the {limit} tokens that the model takes: lower it",
    )
    require(
        settings.length_min <= longest,
        f"data.length_min={settings.length_min} exceeds the {longest} tokens that the model takes: lower it",
    )
    steps = max(settings.num_lengths - 1, 1)
    span = longest - settings.length_min
    return [settings.length_min + round(span * step / steps) for step in range(settings.num_lengths)]


TASKS = {"passkey": PasskeyTask, "disk": DiskTask}


def make_task(
    settings: DataSettings, tokenizer: PreTrainedTokenizerBase, split: str, length_limit: int | None = None
) -> Task:
    """The task that `settings.task` names, for one split.

    Raises:
        UserError: there is no such task, or it cannot make samples with these settings.
    """
    require(settings.task in TASKS, f"data.task={settings.task}: choose {' or '.join(TASKS)}")
    return TASKS[settings.task](settings, tokenizer, split, length_limit)
