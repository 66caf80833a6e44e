"""The tasks of RULER (Hsieh et al. 2024, arXiv 2404.06654) with its parameters, but our own words and sentences."""

from bisect import bisect_right
from itertools import cycle
from typing import NamedTuple

from duo_id.evaluate.tasks.building import LINE, Draft, TaskSample, TooShort, one_index_per_part

VALUES = 4  # numbers of the asked key, or asked keys
CHAINS, HOPS = 3, 4  # variables: chains in total, and assignments that copy
COMMON, RARITY = 10, 10  # words asked for, and how many times rarer the others are
FREQUENT, RANKS = 3, 100  # words asked for, and the limit of different words
MIN_TOP_COUNT = 18  # of the most frequent word, so that the third is more frequent than the fourth


class Wording(NamedTuple):
    """The wording of one split for the first four tasks; {} is the key, or the keys.

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


NUMBER_WORDINGS = {
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


def single(draft: Draft) -> TaskSample:
    """Retrieval of the only number in the text."""
    return _numbered(draft, 1, 1)


def multikey(draft: Draft) -> TaskSample:
    """Retrieval of one key's number in a context of nothing but other keys and numbers (multikey 2 of 3)."""
    wording, tokens = NUMBER_WORDINGS[draft.builder.split], draft.builder.tokens
    max_entries = max(2 * VALUES, draft.size // 8)  # no entry has fewer tokens
    keys = draft.builder.words.things(draft.rng, min(max_entries, draft.builder.words.num_things))
    numbers = [str(number) for number in draft.rng.sample(range(10**5, 10**6), len(keys))]
    entries = (
        [*tokens(wording.needle.format(key)), *tokens(f" {number}"), *tokens(LINE)]
        for key, number in zip(keys, numbers, strict=True)
    )
    context, count = draft.fill(wording.head, entries, least=2 * VALUES, apart=numbers)
    questions = []
    for index in one_index_per_part(draft.rng, count, VALUES):
        question, beginning = wording.one.format(keys[index]), wording.beginning[0].format(keys[index])
        answer = tokens(f" {numbers[index]}")
        questions.append(draft.question(question, beginning, answer, [numbers[index]], index / (count - 1)))
    return context, questions


def multivalue(draft: Draft) -> TaskSample:
    """Retrieval of all numbers of one key, in the order of the text."""
    return _numbered(draft, 1, VALUES)


def multiquery(draft: Draft) -> TaskSample:
    """Retrieval of the numbers of several keys, in the order of the question."""
    return _numbered(draft, VALUES, 1)


def _numbered(draft: Draft, num_keys: int, num_values: int) -> TaskSample:
    """Numbers of keys at random depths, with one question about all of them."""
    wording, tokens, rng = NUMBER_WORDINGS[draft.builder.split], draft.builder.tokens, draft.rng
    keys = draft.not_in_hay(draft.builder.words.things(rng, 3 * num_keys), num_keys)
    numbers = draft.numbers(num_keys * num_values)
    depths = sorted(rng.random() for _ in numbers)
    needle_keys = keys * num_values
    needles = [
        (depth, [*tokens(LINE + wording.needle.format(key)), *tokens(f" {number}"), *tokens(LINE)])
        for depth, key, number in zip(depths, needle_keys, numbers, strict=True)
    ]
    if num_keys > 1:
        order = rng.sample(range(num_keys), num_keys)
        named_keys = [keys[index] for index in order]
        numbers = [numbers[index] for index in order]
        question = wording.several.format(", the ".join(named_keys[:-1]) + f" and the {named_keys[-1]}")
        beginning = wording.beginning[2]
    else:
        several_values = num_values > 1
        question = (wording.all if several_values else wording.one).format(keys[0], count=num_values)
        beginning = wording.beginning[several_values].format(keys[0])
    depth = depths[0] if len(depths) == 1 else None
    question_about = draft.question(question, beginning, draft.builder.comma_separated(numbers), numbers, depth)
    return draft.scatter(wording.head, needles), [question_about]


def variables(draft: Draft) -> TaskSample:
    """Variable tracking: which variables hold a number, directly or through others, among other such chains.

    The right answer lists them in the order of the text.
    """
    head, statement, question, beginning = VARIABLES[draft.builder.split]
    rng, tokens = draft.rng, draft.builder.tokens
    names = draft.not_in_hay(draft.builder.words.made_up(rng, 2 * CHAINS * (HOPS + 1)), CHAINS * (HOPS + 1))
    chains = [names[chain::CHAINS] for chain in range(CHAINS)]
    numbers = draft.numbers(CHAINS, digits=5)
    needles = []
    for number, chain in zip(numbers, chains, strict=True):
        depths = sorted(rng.random() for _ in chain)
        for depth, name, value in zip(depths, chain, [number, *chain], strict=False):
            needles.append((depth, tokens(LINE + statement.format(name, value) + LINE)))
    answer = draft.builder.comma_separated(chains[0])
    question_text = question.format(numbers[0], count=HOPS + 1)
    question_about = draft.question(question_text, beginning.format(numbers[0]), answer, chains[0])
    return draft.scatter(head, needles), [question_about]


def common_words(draft: Draft) -> TaskSample:
    """Identification of the common words in a list: ten words, ten times as frequent as the others.

    Longer contexts repeat every word more often. Order does not count in a generated answer; the right answer lists
    the words by first occurrence.
    """
    head, question, beginning = COMMON_WORDS[draft.builder.split]
    words = draft.shuffled(draft.builder.words.nouns)
    common, rare = words[:COMMON], words[COMMON:]
    pieces = {word: draft.builder.tokens(f" {word}") for word in words}
    cost = {word: len(piece) for word, piece in pieces.items()}
    common_cost, other_cost = sum(map(cost.__getitem__, common)), sum(map(cost.__getitem__, rare))
    space = draft.space(head)
    repeats = max(RARITY, int(space / (common_cost + other_cost / RARITY)))
    word_list = common * repeats
    tokens_left = space - repeats * common_cost
    for word in cycle(rare):
        tokens_left -= cost[word]
        if tokens_left < 0:
            break
        word_list.append(word)
    if len(word_list) < COMMON * (repeats + 1):
        raise TooShort(draft.size - space + repeats * common_cost + COMMON * max(cost.values()))
    word_list = draft.shuffled(word_list)
    context, _ = draft.fill(head, map(pieces.__getitem__, word_list), apart=words)
    answers = sorted(common, key=word_list.index)
    question_text = question.format(count=COMMON)
    return context, [draft.question(question_text, beginning, draft.builder.comma_separated(answers), answers)]


def frequent_words(draft: Draft) -> TaskSample:
    """Identification of the most frequent words, where counts fall as 1 / rank² (zeta, α = 2)."""
    head, question, beginning = FREQUENT_WORDS[draft.builder.split]
    words = draft.builder.words.made_up(draft.rng, RANKS)
    pieces = {word: draft.builder.tokens(f" {word}") for word in words}
    space = draft.space(head)

    def tokens_for(top_count: int) -> int:
        """Tokens of all words if the most frequent one occurs `top_count` times."""
        return sum(top_count // rank**2 * len(pieces[word]) for rank, word in enumerate(words, start=1))

    top_count = bisect_right(range(space), space, key=tokens_for) - 1
    if top_count < MIN_TOP_COUNT:
        raise TooShort(draft.size - space + tokens_for(MIN_TOP_COUNT))
    word_list = [word for rank, word in enumerate(words, start=1) for _ in range(top_count // rank**2)]
    context, _ = draft.fill(head, map(pieces.__getitem__, draft.shuffled(word_list)), apart=words)
    question_text = question.format(count=FREQUENT)
    answers = words[:FREQUENT]
    return context, [draft.question(question_text, beginning, draft.builder.comma_separated(answers), answers)]
