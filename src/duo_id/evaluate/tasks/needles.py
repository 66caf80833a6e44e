"""Needles in a haystack: short statements at known depths in unrelated text, with a question about each."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from duo_id.evaluate.items import Question
from duo_id.evaluate.tasks.building import LINE, Draft, TaskSample, evenly_spaced

PASSKEYS = 4
MAX_NEEDLES = 40  # per context, limited by the number of cities


class Wording(NamedTuple):
    """The wording of one split; {} is the needle's subject.

    Attributes:
        head: in front of the hay.
        needle: up to the answer.
        question: about the needle.
        beginning: of the answer.
    """

    head: str
    needle: str
    question: str
    beginning: str


WORD_WORDINGS = {
    "development": Wording(
        "Some cities have a code word of three parts. The text names it somewhere.\n\n",
        "The code word of {} is:",
        "What is the code word of {}?",
        "The code word of {} is:",
    ),
    "test": Wording(
        "Every watchword in these pages consists of three nouns and belongs to one town.\n\n",
        "The guards of {} ask for the watchword",
        "Which watchword do the guards of {} ask for?",
        "The guards of {} ask for the watchword",
    ),
}
NUMBER_WORDINGS = {
    "development": Wording(
        "Several people hold a ticket. Look out for its number as you read.\n\n",
        "The ticket of {} has the number",
        "Which number does the ticket of {} have?",
        "The ticket of {} has the number",
    ),
    "test": Wording(
        "Somewhere in these pages it says which locker each guest was given.\n\n",
        "{} was given the locker with number",
        "Which locker was {} given?",
        "{} was given the locker with number",
    ),
}
SENTENCE_WORDINGS = {
    "development": Wording(
        "A few diaries are quoted within this text. Note what they say.\n\n",
        "The diary of {} says:",
        "What does the diary of {} say?",
        "The diary of {} says:",
    ),
    "test": Wording(
        "Between other things you will find what some people wrote home in their letters.\n\n",
        "{} wrote home in a letter:",
        "What did {} write home in a letter?",
        "{} wrote home in a letter:",
    ),
}
SENTENCE = {
    "development": "The {} was hidden behind my {} all night.",
    "test": "Nobody noticed that the {} had replaced my {}.",
}
PASSKEY_WORDINGS = {
    "development": Wording(
        "To open a room you need its passkey, and the passkeys are scattered through this text.\n\n",
        "Passkey to the {} room:",
        "What is the passkey to the {} room?",
        "Passkey to the {} room:",
    ),
    "test": Wording(
        "This text mentions vaults that open with a passkey. Remember which is which.\n\n",
        "The {} vault opens with passkey",
        "With which passkey does the {} vault open?",
        "The {} vault opens with passkey",
    ),
}


def needle_words(draft: Draft) -> TaskSample:
    """Retrieval of three words at each depth: the needle in a haystack (Kamradt 2023), with answers of words."""
    words = draft.builder.words
    nouns = draft.rng.sample(words.nouns, 3 * draft.depths)
    answers = [" ".join(nouns[start : start + 3]) for start in range(0, len(nouns), 3)]
    return _over_depths(draft, WORD_WORDINGS[draft.builder.split], words.cities, answers)


def needle_numbers(draft: Draft) -> TaskSample:
    """Retrieval of a number at each depth: the needle in a haystack (Kamradt 2023), with answers of digits."""
    wording = NUMBER_WORDINGS[draft.builder.split]
    return _over_depths(draft, wording, draft.builder.words.names, draft.numbers(draft.depths))


def needle_sentences(draft: Draft) -> TaskSample:
    """Retrieval of a sentence at each depth: the needle in a haystack (Kamradt 2023), repeated in full."""
    words, split = draft.builder.words, draft.builder.split
    answers = [SENTENCE[split].format(*words.things(draft.rng, 2)) for _ in range(draft.depths)]
    return _over_depths(draft, SENTENCE_WORDINGS[split], words.names, answers)


def passkeys(draft: Draft) -> TaskSample:
    """Retrieval of several passkeys at random depths (Mohtashami and Jaggi 2023, arXiv 2305.16300)."""
    depths = sorted(draft.rng.random() for _ in range(PASSKEYS))
    wording = PASSKEY_WORDINGS[draft.builder.split]
    return _hide_and_ask(draft, wording, draft.builder.words.adjectives, draft.numbers(PASSKEYS, digits=5), depths)


def mixed(draft: Draft) -> TaskSample:
    """Retrieval of words, numbers and sentences from one context, a third of its needles each."""
    words, split, rng = draft.builder.words, draft.builder.split, draft.rng
    count, depths = draft.depths // 3, evenly_spaced(draft.depths // 3 * 3)
    nouns = rng.sample(words.nouns, 3 * count)
    guests, writers = words.names[::2], words.names[1::2]
    kinds = (
        (WORD_WORDINGS[split], words.cities, [" ".join(nouns[number::count]) for number in range(count)]),
        (NUMBER_WORDINGS[split], guests, draft.numbers(count)),
        (SENTENCE_WORDINGS[split], writers, [SENTENCE[split].format(*words.things(rng, 2)) for _ in range(count)]),
    )
    hidden = [
        pair
        for number, (wording, subjects, answers) in enumerate(kinds)
        for pair in _hidden(draft, wording, subjects, answers, depths[number::3])
    ]
    needles, questions = zip(*hidden, strict=True)
    return draft.scatter("".join(wording.head for wording, *_ in kinds), needles), list(questions)


def _over_depths(draft: Draft, wording: Wording, subjects: Sequence[str], answers: Sequence[str]) -> TaskSample:
    return _hide_and_ask(draft, wording, subjects, answers, evenly_spaced(draft.depths))


def _hide_and_ask(
    draft: Draft, wording: Wording, subjects: Sequence[str], answers: Sequence[str], depths: Sequence[float]
) -> TaskSample:
    """A context with one needle per answer, and a question about each."""
    needles, questions = zip(*_hidden(draft, wording, subjects, answers, depths), strict=True)
    return draft.scatter(wording.head, needles), list(questions)


def _hidden(
    draft: Draft, wording: Wording, subjects: Sequence[str], answers: Sequence[str], depths: Sequence[float]
) -> Iterator[tuple[tuple[float, list[int]], Question]]:
    """One needle, at its depth, and question per answer, about different subjects that the hay does not mention."""
    tokens = draft.builder.tokens
    chosen = draft.not_in_hay(draft.shuffled(subjects), len(answers))
    for subject, answer, depth in zip(chosen, answers, depths, strict=True):
        answer_tokens = tokens(f" {answer}")
        needle = [*tokens(LINE + wording.needle.format(subject)), *answer_tokens, *tokens(LINE)]
        question, beginning = wording.question.format(subject), wording.beginning.format(subject)
        yield (depth, needle), draft.question(question, beginning, answer_tokens, [answer], depth)
