"""Prediction of natural text: over its whole length, and where it repeats itself."""

from collections import Counter, defaultdict
from random import Random

from duo_id.common.errors import UserError
from duo_id.evaluate.items import Question
from duo_id.evaluate.tasks.building import Draft, TaskSample, TooShort

BLOCKS, BLOCK = 8, 64  # scored blocks, and tokens per block where the context is long enough
UNSCORED_TOKENS = 32  # tokens at the start, where there is no context to predict from
MIN_NGRAM = 3  # tokens of the shortest repetition
MIN_DISTANCE = 256  # tokens between an n-gram and its repetition, or a quarter of the context if that is less
MIN_REPETITIONS, MAX_REPETITIONS = 4, 8  # scored per context
COPY = 8  # tokens of a copied n-gram
WINDOWS = 20  # haystack windows to try
PARTS = 3  # of the context: n-grams are copied from the first to the last

Repetition = tuple[int, int, int]  # starts of the first and the second occurrence of an n-gram, and its length


def language(draft: Draft) -> TaskSample:
    """Loss by position: eight blocks of 64 tokens of natural text, evenly spaced up to the end.

    Blocks are shorter where eight of them would overlap (evaluation by position as in Press et al. 2021, arXiv
    2108.12409).
    """
    before = draft.builder.chat.before
    context = [*before, *draft.hay[: draft.size - len(before)]]
    first = len(before) + UNSCORED_TOKENS
    block = min(BLOCK, (draft.size - first) // BLOCKS)
    if block < 1:
        raise TooShort(first + BLOCKS)
    step = (draft.size - block - first) / (BLOCKS - 1)
    starts = [first + round(step * number) for number in range(BLOCKS)]
    return context, [_scored_span(context, start, block, start / draft.size) for start in starts]


def rare_ngrams(draft: Draft) -> TaskSample:
    """Prediction of repeated n-grams in natural text, the job of induction heads (arXiv 2209.11895).

    An n-gram of three tokens or more is scored on its second occurrence, less the first token, if the context has it
    exactly twice, at least 256 tokens or a quarter of the context apart, and one of its tokens occurs nowhere else.
    Where the text has fewer than four of these, n-grams of eight tokens that are unique in its first third overwrite
    random positions of its last third: that breaks the text, but is a repetition like any other.
    """
    builder, rng = draft.builder, draft.rng
    before, gram, size = builder.chat.before, builder.scaled(MIN_NGRAM), builder.scaled(COPY)
    length = draft.size - len(before)
    if length < PARTS * MIN_REPETITIONS * 2 * size:
        raise TooShort(len(before) + PARTS * MIN_REPETITIONS * 2 * size)
    for _ in range(WINDOWS):
        hay = builder.haystack.window(rng, length, builder.tokenizer)
        repetitions = _repetitions(hay, gram, 2 * size)
        repetitions = rng.sample(repetitions, min(MAX_REPETITIONS, len(repetitions)))
        repetitions += _copy_ngrams(rng, hay, MIN_REPETITIONS - len(repetitions), gram, size, repetitions)
        if len(repetitions) >= MIN_REPETITIONS:
            break
    else:
        raise UserError(
            "rare-ngrams finds no unique n-grams in the haystack: leave it out of tasks or give another data.haystack"
        )
    context = [*before, *hay]
    return context, [
        _scored_span(context, len(before) + second + 1, length - 1, first / len(hay))
        for first, second, length in sorted(repetitions, key=lambda repetition: repetition[1])
    ]


def _repetitions(hay: list[int], gram: int, longest: int) -> list[Repetition]:
    """Rare n-grams that occur twice, without overlaps between second occurrences.

    Args:
        hay: tokens of the text.
        gram: tokens of the shortest repetition.
        longest: limit in tokens on a repetition.
    """
    min_distance = min(MIN_DISTANCE, len(hay) // 4)
    counts = Counter(hay)
    occurrences = defaultdict(list)
    for start in range(len(hay) - gram + 1):
        occurrences[tuple(hay[start : start + gram])].append(start)
    pairs = sorted(
        (starts[1], starts[0])
        for starts in occurrences.values()
        if len(starts) == 2 and starts[1] - starts[0] >= min_distance
    )
    repetitions: list[Repetition] = []
    end = 0
    for second, first in pairs:
        if second < end:
            continue
        length = gram
        while length < longest and second + length < len(hay) and hay[first + length] == hay[second + length]:
            length += 1
        end = second + length
        if any(counts[token] == 2 for token in hay[second:end]):
            repetitions.append((first, second, length))
    return repetitions


def _copy_ngrams(
    rng: Random, hay: list[int], count: int, gram: int, size: int, existing: list[Repetition]
) -> list[Repetition]:
    """Copy up to `count` n-grams of `size` tokens, each with a unique beginning, within `hay`.

    None touches the existing repetitions.
    """
    third = len(hay) // PARTS
    occupied = [start for first, second, _ in existing for start in (first, second)]
    longest = max((length for *_, length in existing), default=0)
    grams = Counter(tuple(hay[start : start + gram]) for start in range(len(hay)))

    def free(starts: range) -> list[int]:
        return [
            start for start in starts if all(start + size <= begin or start >= begin + longest for begin in occupied)
        ]

    sources = [start for start in free(range(0, third - size, size)) if grams[tuple(hay[start : start + gram])] == 1]
    targets = free(range(len(hay) - third, len(hay) - size, size))
    count = min(count, len(sources), len(targets))
    if count <= 0:
        return []
    copies = list(zip(rng.sample(sources, count), rng.sample(targets, count), strict=True))
    for first, second in copies:
        hay[second : second + size] = hay[first : first + size]
    return [(first, second, size) for first, second in copies]


def _scored_span(context: list[int], start: int, length: int, depth: float) -> Question:
    return Question((), tuple(context[start : start + length]), depth=depth, place=start)
