"""Prompts that a model writes after: a passage of the haystack, and a request about all of it."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from duo_id.common.errors import check
from duo_id.data.chat import Chat, plain, split_chat
from duo_id.data.haystack import Haystack, tokenize
from duo_id.data.samples import SPLITS
from duo_id.data.settings import DataSettings
from duo_id.data.synthetic import lengths_of

REQUESTS = (
    "Retell everything above in your own words, from beginning to end, and leave nothing out.",
    "Write a detailed summary of the text above, one paragraph for each of its parts, in their order.",
    "Make a long list of the facts that the text above states, in the order in which they appear.",
    "Explain the text above to a beginner, step by step, with an example from it for each step.",
    "Write ten questions that the text above answers, each followed by its answer.",
    "Think aloud: go through the text above piece by piece, reason about what each piece means, and then conclude.",
)
HELD_OUT = 4  # training texts for each text of validation, and of test
LENGTHS = 8  # of samples, at most: texts of one length are written together


@dataclass(frozen=True)
class Prompt:
    """What a text is written after.

    Attributes:
        split: whose text it reads and is for.
        tokens: all of it.
        limit: tokens to write at most.
        temperature: of the draws.
    """

    split: str
    tokens: list[int]
    limit: int
    temperature: float


def prompts(
    settings: DataSettings,
    tokenizer: PreTrainedTokenizerBase,
    chat: Chat,
    haystacks: Mapping[str, Haystack],
    lengths: Sequence[int],
    place: int,
) -> list[Prompt]:
    """The prompts of one length, of all splits; each is a function of the settings, its split and its number.

    Args:
        settings: of the samples.
        tokenizer: of the model.
        chat: what stands around each, see `chat_of`.
        haystacks: of the splits.
        lengths: of samples, see `prompt_lengths`; they and the temperatures take turns.
        place: of the length.

    Raises:
        UserError: such a sample has no room for a passage beside the request and what is written.
    """
    made, limit = [], most_written(settings, lengths[place])
    for split, count in counts(settings).items():
        for number in range(place, count, len(lengths)):
            rng = random.Random(f"{settings.self_seed}:self:{split}:{number}")
            request = tokenize(tokenizer, f"\n\n{rng.choice(REQUESTS)}")
            after = [*request, *(chat.after or tokenize(tokenizer, "\n\n"))]
            room = lengths[place] - limit - len(chat.before) - len(after)
            check(
                room >= len(request),
                f"data.length_min={settings.length_min} leaves {max(room, 0)} tokens for a passage, beside a request "
                f"and {limit} tokens that the model writes: raise it, or lower data.self_share",
            )
            tokens = [*chat.before, *haystacks[split].window(rng, room, tokenizer), *after]
            turn = number // len(lengths)
            made.append(
                Prompt(split, tokens, limit, settings.self_temperatures[turn % len(settings.self_temperatures)])
            )
    return made


def most_written(settings: DataSettings, length: int) -> int:
    """The tokens that a model writes at most of a sample of so many."""
    return max(min(settings.self_tokens, round(settings.self_share * length)), 1)


def counts(settings: DataSettings) -> dict[str, int]:
    """How many texts each split has."""
    held_out = max(settings.self_samples // HELD_OUT, 1)
    return {split: settings.self_samples if split == "train" else held_out for split in SPLITS}


def chat_of(settings: DataSettings, tokenizer: PreTrainedTokenizerBase) -> Chat:
    """What stands around a prompt: the tokenizer's chat template, if it has one and the settings do not forbid it.

    Raises:
        UserError: there is none although the settings ask for it, or it does not work.
    """
    templated = bool(tokenizer.chat_template) if settings.self_chat is None else settings.self_chat
    return split_chat(tokenizer, "data.self_chat", thinking=True) if templated else plain(tokenizer)


def prompt_lengths(settings: DataSettings, limit: int | None) -> list[int]:
    """Lengths of samples, at most `LENGTHS`, evenly spread over those of the settings.

    Args:
        settings: of the samples.
        limit: the model's maximum number of tokens; None: no limit.

    Raises:
        UserError: they are longer than that.
    """
    lengths = lengths_of(settings, limit)
    count = min(len(lengths), LENGTHS)
    return [lengths[place * (len(lengths) - 1) // max(count - 1, 1)] for place in range(count)]
