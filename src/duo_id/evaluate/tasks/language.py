"""How well natural text is predicted: over its whole length, and where it repeats itself."""

from collections import Counter, defaultdict
from random import Random

from duo_id.common.errors import UserError
from duo_id.evaluate.items import Question
from duo_id.evaluate.tasks.building import Draft, Made, TooShort

BLOCKS, BLOCK = 8, 64  # scored blocks, and tokens of each where the context is long enough
FIRST = 32  # tokens in front that are not scored: nothing is known of the text yet
GRAM = 3  # tokens that a repetition has at least
FAR = 256  # tokens between an n-gram and its repetition; a quarter of the context if that is less
FEWEST, MOST = 4, 8  # repetitions that are scored
COPY = 8  # tokens of a copied n-gram
WINDOWS = 20  # that are tried
PARTS = 3  # of the context: n-grams are copied from the first to the last

Places = tuple[int, int, int]  # of an n-gram: where it begins first, where it begins again, and its tokens


def language(draft: Draft) -> Made:
    """How loss goes over position: eight blocks of 64 tokens of natural text, evenly spaced up to the end.

    Blocks are shorter where eight of them would overlap (the evaluation of language models by position: Press et
    al. 2021, arXiv 2108.12409).
    """
    before = draft.builder.chat.before
    context = [*before, *draft.hay[: draft.size - len(before)]]
    first = len(before) + FIRST
    block = min(BLOCK, (draft.size - first) // BLOCKS)
    if block < 1:
        raise TooShort(first + BLOCKS)
    step = (draft.size - block - first) / (BLOCKS - 1)
    places = [first + round(step * number) for number in range(BLOCKS)]
    return context, [_scored(context, place, block, place / draft.size) for place in places]


def rare_ngrams(draft: Draft) -> Made:
    """How well natural text that repeats itself is predicted: what induction heads are for (arXiv 2209.11895).

    Scored is the second occurrence, less its first token, of n-grams with three tokens or more that the context
    has twice, at least 256 tokens or a quarter of the context apart, and of whose tokens one occurs nowhere else. Where
    the text has fewer than four, n-grams of eight tokens that are unique in its first third are copied over what stands
    at random places of its last third: that breaks the text, but makes a repetition like any other.
    """
    builder, rng = draft.builder, draft.rng
    before, gram, size = builder.chat.before, builder.scaled(GRAM), builder.scaled(COPY)
    length = draft.size - len(before)
    if length < PARTS * FEWEST * 2 * size:
        raise TooShort(len(before) + PARTS * FEWEST * 2 * size)
    for _ in range(WINDOWS):
        hay = builder.haystack.window(rng, length, builder.tokenizer)
        found = _repetitions(hay, gram, 2 * size)
        found = rng.sample(found, min(MOST, len(found)))
        found += _copied(rng, hay, FEWEST - len(found), gram, size, found)
        if len(found) >= FEWEST:
            break
    else:
        raise UserError(
            "rare-ngrams finds nothing in the haystack that does not repeat itself: leave it out of tasks or give "
            "another data.haystack"
        )
    context = [*before, *hay]
    return context, [
        _scored(context, len(before) + second + 1, length - 1, first / len(hay))
        for first, second, length in sorted(found, key=lambda places: places[1])
    ]


def _repetitions(hay: list[int], gram: int, longest: int) -> list[Places]:
    """Rare n-grams that come twice, none overlapping in its second occurrence.

    Args:
        hay: tokens of the text.
        gram: tokens that a repetition has at least.
        longest: tokens of a repetition that are looked at.
    """
    far = min(FAR, len(hay) // 4)
    counts = Counter(hay)
    places = defaultdict(list)
    for place in range(len(hay) - gram + 1):
        places[tuple(hay[place : place + gram])].append(place)
    pairs = sorted((pair[1], pair[0]) for pair in places.values() if len(pair) == 2 and pair[1] - pair[0] >= far)
    found: list[Places] = []
    end = 0
    for second, first in pairs:
        if second < end:
            continue
        length = gram
        while length < longest and second + length < len(hay) and hay[first + length] == hay[second + length]:
            length += 1
        end = second + length
        if any(counts[token] == 2 for token in hay[second:end]):
            found.append((first, second, length))
    return found


def _copied(rng: Random, hay: list[int], count: int, gram: int, size: int, found: list[Places]) -> list[Places]:
    """Copy up to `count` n-grams of `size` tokens, each with a beginning of its own, within `hay`.

    None touches the repetitions already found.
    """
    third = len(hay) // PARTS
    begins = [start for first, second, _ in found for start in (first, second)]
    longest = max((length for *_, length in found), default=0)
    grams = Counter(tuple(hay[place : place + gram]) for place in range(len(hay)))

    def free(places: range) -> list[int]:
        return [place for place in places if all(place + size <= begin or place >= begin + longest for begin in begins)]

    sources = [place for place in free(range(0, third - size, size)) if grams[tuple(hay[place : place + gram])] == 1]
    targets = free(range(len(hay) - third, len(hay) - size, size))
    count = min(count, len(sources), len(targets))
    if count <= 0:
        return []
    copies = list(zip(rng.sample(sources, count), rng.sample(targets, count), strict=True))
    for first, second in copies:
        hay[second : second + size] = hay[first : first + size]
    return [(first, second, size) for first, second in copies]


def _scored(context: list[int], place: int, length: int, depth: float) -> Question:
    return Question((), tuple(context[place : place + length]), depth=depth, place=place)
