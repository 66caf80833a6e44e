"""The tasks of RULER (Hsieh et al. 2024, arXiv 2404.06654), its parameters with words and sentences of our own."""

from bisect import bisect_right
from itertools import cycle
from typing import NamedTuple

from duo_id.evaluate.tasks.building import LINE, Draft, Made, TooShort, one_of_each_part

VALUES = 4  # numbers of the asked key, or asked keys
CHAINS, HOPS = 3, 4  # of variables: chains in all, and assignments that copy
COMMON, RARER = 10, 10  # words that are asked for, and how many times rarer the others are
FREQUENT, RANKS = 3, 100  # words that are asked for, and different words at most
CLEAR = 18  # times that the most frequent word comes at least, so that the third is more frequent than the fourth


class Wording(NamedTuple):
    """How one split puts what the first four tasks ask; {} is the key, or the keys.

    Attributes:
        head: in front of the context.
        needle: one number of a key, up to the number.
        one: asks for the only number of a key.
        all: asks for all numbers of a key.
        several: asks for the numbers of several keys.
        beginning: of an answer of one number, of all numbers, of those of several keys.
    """

    head: str
    needle: str
    one: str
    all: str
    several: str
    beginning: tuple[str, str, str]


NUMBERED = {
    "development": Wording(
        "Some things in this text have a registered number.\n\n",
        "A registered number of the {} is:",
        "What is the registered number of the {}?",
        "What are the {count} registered numbers of the {}, in the order of the text?",
        "What are the registered numbers of the {}, in this order?",
        (
            "A registered number of the {} is:",
            "The registered numbers of the {} are:",
            "Their registered numbers, in this order, are:",
        ),
    ),
    "test": Wording(
        "A collector wrote down what he paid. The prices stand here and there in the following pages.\n\n",
        "He once paid for the {} a price of",
        "Which price did he pay for the {}?",
        "Which {count} prices did he pay for the {}, one after another?",
        "Which prices did he pay for the {}, in this order?",
        ("He once paid for the {} a price of", "He paid for the {} the prices", "He paid for them the prices"),
    ),
}
VARIABLES = {
    "development": (
        "Variables are set to numbers or to the values of other variables, on lines of their own.\n\n",
        "Set {} to {}.",
        "Which {count} variables have the value {}, set to it directly or to a variable that has it?",
        "The variables with the value {} are:",
    ),
    "test": (
        "Boxes are labelled in this text, now and then one box with what stands on another.\n\n",
        "Label box {} like {}.",
        "Which {count} boxes are labelled {} in the end, also by way of other boxes?",
        "The boxes that are labelled {} are:",
    ),
}
COMMON_WORDS = {
    "development": (
        "A list of words, a few of which come up far more often than all others:\n",
        "Which {count} words come up most often in the list?",
        "The words that come up most often are:",
    ),
    "test": (
        "Someone counted what passed the window, one word for each thing, and some things kept passing:\n",
        "Which {count} things passed the window the most times?",
        "The things that passed the most times are:",
    ),
}
FREQUENT_WORDS = {
    "development": (
        "A message in a secret language. Pay attention to how often each word is used:\n",
        "Which {count} words are used most often in the message? Begin with the most frequent.",
        "The words that are used most often are:",
    ),
    "test": (
        "The calls of a bird, written down. It has favourites:\n",
        "Which {count} calls does the bird repeat the most, from its favourite on?",
        "The bird repeats the most:",
    ),
}


def single(draft: Draft) -> Made:
    """Whether the one number that the text names is found."""
    return _numbered(draft, 1, 1)


def multikey(draft: Draft) -> Made:
    """Whether one number is told from those of other keys, which are all that the context holds (multikey 2 of 3)."""
    wording, tokens = NUMBERED[draft.builder.split], draft.builder.tokens
    most = max(2 * VALUES, draft.size // 8)  # no entry has fewer tokens
    keys = draft.builder.words.things(draft.rng, min(most, draft.builder.words.num_things))
    numbers = [str(number) for number in draft.rng.sample(range(10**5, 10**6), len(keys))]
    entries = (
        [*tokens(wording.needle.format(key)), *tokens(f" {number}"), *tokens(LINE)]
        for key, number in zip(keys, numbers, strict=True)
    )
    context, count = draft.fill(wording.head, entries, least=2 * VALUES, apart=numbers)
    questions = []
    for place in one_of_each_part(draft.rng, count, VALUES):
        question, beginning = wording.one.format(keys[place]), wording.beginning[0].format(keys[place])
        answer = tokens(f" {numbers[place]}")
        questions.append(draft.question(question, beginning, answer, [numbers[place]], place / (count - 1)))
    return context, questions


def multivalue(draft: Draft) -> Made:
    """Whether all numbers of one key are found, told in the order of the text."""
    return _numbered(draft, 1, VALUES)


def multiquery(draft: Draft) -> Made:
    """Whether the numbers of several keys are found, told in the order of the question."""
    return _numbered(draft, VALUES, 1)


def _numbered(draft: Draft, num_keys: int, num_values: int) -> Made:
    """Numbers of keys at random depths, all of them asked for at once."""
    wording, tokens, rng = NUMBERED[draft.builder.split], draft.builder.tokens, draft.rng
    keys = draft.absent(draft.builder.words.things(rng, 3 * num_keys), num_keys)
    numbers = draft.numbers(num_keys * num_values)
    depths = sorted(rng.random() for _ in numbers)
    owners = keys * num_values
    needles = [
        (depth, [*tokens(LINE + wording.needle.format(key)), *tokens(f" {number}"), *tokens(LINE)])
        for depth, key, number in zip(depths, owners, numbers, strict=True)
    ]
    if num_keys > 1:
        asked = rng.sample(range(num_keys), num_keys)
        named = [keys[place] for place in asked]
        numbers = [numbers[place] for place in asked]
        question = wording.several.format(", the ".join(named[:-1]) + f" and the {named[-1]}")
        beginning = wording.beginning[2]
    else:
        kind = num_values > 1
        question = (wording.all if kind else wording.one).format(keys[0], count=num_values)
        beginning = wording.beginning[kind].format(keys[0])
    depth = depths[0] if len(depths) == 1 else None
    asks = draft.question(question, beginning, draft.builder.listed(numbers), numbers, depth)
    return draft.scatter(wording.head, needles), [asks]


def variables(draft: Draft) -> Made:
    """Whether assignments are followed: which variables hold a number, by way of others, among other such chains.

    The right answer that is scored names them in the order of the text.
    """
    head, statement, question, beginning = VARIABLES[draft.builder.split]
    rng, tokens = draft.rng, draft.builder.tokens
    names = draft.absent(draft.builder.words.made_up(rng, 2 * CHAINS * (HOPS + 1)), CHAINS * (HOPS + 1))
    chains = [names[chain::CHAINS] for chain in range(CHAINS)]
    numbers = draft.numbers(CHAINS, digits=5)
    needles = []
    for number, chain in zip(numbers, chains, strict=True):
        depths = sorted(rng.random() for _ in chain)
        for depth, name, value in zip(depths, chain, [number, *chain], strict=False):
            needles.append((depth, tokens(LINE + statement.format(name, value) + LINE)))
    answer = draft.builder.listed(chains[0])
    asked = question.format(numbers[0], count=HOPS + 1)
    return draft.scatter(head, needles), [draft.question(asked, beginning.format(numbers[0]), answer, chains[0])]


def common_words(draft: Draft) -> Made:
    """Whether words that come up often are told from all others: ten words, ten times as frequent.

    Longer contexts repeat every word more often. Order does not count; the right answer that is scored names the words
    in that of their first occurrence.
    """
    head, question, beginning = COMMON_WORDS[draft.builder.split]
    words = draft.shuffled(draft.builder.words.nouns)
    common, others = words[:COMMON], words[COMMON:]
    pieces = {word: draft.builder.tokens(f" {word}") for word in words}
    cost = {word: len(piece) for word, piece in pieces.items()}
    each, rest = sum(map(cost.__getitem__, common)), sum(map(cost.__getitem__, others))
    space = draft.space(head)
    often = max(RARER, int(space / (each + rest / RARER)))
    listed = common * often
    left = space - often * each
    for word in cycle(others):
        left -= cost[word]
        if left < 0:
            break
        listed.append(word)
    if len(listed) < COMMON * (often + 1):
        raise TooShort(draft.size - space + often * each + COMMON * max(cost.values()))
    listed = draft.shuffled(listed)
    context, _ = draft.fill(head, map(pieces.__getitem__, listed), apart=words)
    answers = sorted(common, key=listed.index)
    asked = question.format(count=COMMON)
    return context, [draft.question(asked, beginning, draft.builder.listed(answers), answers)]


def frequent_words(draft: Draft) -> Made:
    """Whether frequencies are told apart: the most frequent of words whose counts fall as 1 / rank² (zeta, α = 2)."""
    head, question, beginning = FREQUENT_WORDS[draft.builder.split]
    words = draft.builder.words.made_up(draft.rng, RANKS)
    pieces = {word: draft.builder.tokens(f" {word}") for word in words}
    space = draft.space(head)

    def needed(first: int) -> int:
        """Tokens of all words if the most frequent one comes so often."""
        return sum(first // rank**2 * len(pieces[word]) for rank, word in enumerate(words, start=1))

    first = bisect_right(range(space), space, key=needed) - 1
    if first < CLEAR:
        raise TooShort(draft.size - space + needed(CLEAR))
    listed = [word for rank, word in enumerate(words, start=1) for _ in range(first // rank**2)]
    context, _ = draft.fill(head, map(pieces.__getitem__, draft.shuffled(listed)), apart=words)
    asked = question.format(count=FREQUENT)
    return context, [draft.question(asked, beginning, draft.builder.listed(words[:FREQUENT]), words[:FREQUENT])]
