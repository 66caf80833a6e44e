"""Exact lookup: values of keys, passages, lists, the labels of examples."""

from collections.abc import Iterator
from itertools import chain, islice

from duo_id.common.errors import check
from duo_id.evaluate.tasks.building import BLANK_LINE, LINE, Draft, TaskSample, one_index_per_part

QUESTIONS = 4  # per context
PASSAGES, PASSAGE = 3, 24  # copying: passages, and tokens of each
DISTINCT = 40  # leading characters of a passage that occur nowhere else
WINDOWS = 100  # haystack windows searched for passages
LIST_LENGTH = 6  # words

JSON = {
    "development": ("Here is a JSON object.\n\n{", "What is the value of the key {}?"),
    "test": ("Look up values in the following JSON data.\n\n{", "Which value is stored in the data under {}?"),
}
COPYING = {
    "development": ("The passage called {} begins:", "Repeat the passage called {}, word for word."),
    "test": ("Excerpt {} reads:", "Write down excerpt {} once more, exactly as it stands above."),
}
LISTS = {
    "development": (
        "The list of {}:",
        ("Repeat the list of {} in reverse order.", "The list of {} in reverse order:"),
        ("Repeat the list of {} in alphabetical order.", "The list of {} in alphabetical order:"),
    ),
    "test": (
        "What {} bought:",
        ("Say what {} bought, from the last thing to the first.", "From the last to the first, {} bought:"),
        ("Say what {} bought, in alphabetical order.", "Alphabetically, {} bought:"),
    ),
}
TEXTS = {
    "development": ("Every sentence has one of four labels.\n\n", "Sentence: {}", "Label:"),
    "test": ("Remarks and the class that each belongs to.\n\n", "Remark: {}", "Class:"),
}
REMARKS = {
    "development": (
        "Yesterday everyone talked about the {}.",
        "The {} was all that he could think of.",
        "We have never seen anything like the {}.",
        "Please tell me more about the {}.",
        "Nobody here cares for the {}.",
        "There is a photograph of the {}.",
    ),
    "test": (
        "She wrote a long report on the {}.",
        "My brother never liked the {}.",
        "They argued about the {} for hours.",
        "It all began with the {}.",
        "The {} surprised us once again.",
        "What a pity that the {} is gone!",
    ),
}
TOPICS = {
    "development": (
        "orchestra melody choir opera symphony concert lullaby soprano",
        "blizzard hailstorm drizzle heatwave hurricane rainfall thunderstorm snowfall",
        "surgeon vaccine hospital nurse fever ambulance clinic pharmacy",
        "goalkeeper marathon referee stadium tournament athlete hockey football",
    ),
    "test": (
        "classroom homework professor pupil exam lecture university diploma",
        "airport luggage passport suitcase tourist cruise voyage hotelier",
        "lawyer courtroom verdict prosecutor lawsuit judgement witness attorney",
        "casserole omelette gravy dumpling pancake stew lasagna recipe",
    ),
}
OWNERSHIP = {
    "development": ("{} owns the", "What does {} own?", "kiln lute oboe fife dory yawl awl tuba mug sitar"),
    "test": ("{} sold the", "What was sold by {}?", "gong kayak lyre skis viola atlas banjo anvil abacus sundial"),
}


def json_lookup(draft: Draft, num_questions: int = QUESTIONS) -> TaskSample:
    """Lookup of a key's value among many alike in a JSON object (Liu et al. 2023, arXiv 2307.03172)."""
    head, question = JSON[draft.builder.split]
    tokens, words = draft.builder.tokens, draft.builder.words
    max_entries = max(2 * num_questions, draft.size // 8)  # no entry has fewer tokens
    made_up = words.made_up(draft.rng, min(2 * max_entries, words.num_made_up))
    keys, values = made_up[::2], made_up[1::2]

    def entries() -> Iterator[list[int]]:
        for number, (key, value) in enumerate(zip(keys, values, strict=False)):
            yield [*tokens(f'{"," if number else ""}\n"{key}": "'), *tokens(value), *tokens('"')]

    context, count = draft.fill(head, entries(), "\n}", least=2 * num_questions)
    questions = []
    for index in one_index_per_part(draft.rng, count, num_questions):
        key, value = keys[index], values[index]
        question_text, beginning = question.format(f'"{key}"'), f'"{key}": "'
        questions.append(draft.question(question_text, beginning, tokens(value), [value], index / (count - 1)))
    return context, questions


def copying(draft: Draft) -> TaskSample:
    """Verbatim copying of a passage that the text marks with a unique name.

    What induction heads do (Olsson et al. 2022, arXiv 2209.11895), over a distance.
    """
    cue, question = COPYING[draft.builder.split]
    builder = draft.builder
    size = builder.scaled(PASSAGE)
    names = [name.capitalize() for name in builder.words.made_up(draft.rng, 3 * PASSAGES)]
    passages = list(islice(_passages(draft, size), PASSAGES))
    check(
        len(passages) == PASSAGES,
        f"the haystack repeats itself, copying finds fewer than {PASSAGES} unique passages: leave copying out of tasks "
        "or give another data.haystack",
    )
    needles, questions = [], []
    for number, (name, passage) in enumerate(zip(draft.not_in_hay(names, PASSAGES), passages, strict=True)):
        depth = (number + draft.rng.random()) / (PASSAGES + 1)  # never in the last part, near the question
        needles.append((depth, [*builder.tokens(LINE + cue.format(name)), *passage, *builder.tokens(LINE)]))
        reference = builder.text(passage).strip()
        questions.append(draft.question(question.format(name), cue.format(name), passage, [reference], depth))
    return draft.scatter("", needles), questions


def _passages(draft: Draft, size: int) -> Iterator[list[int]]:
    """Passages of `size` tokens, each on one line, that the context's hay does not contain.

    They come from right after the hay, then from anywhere: a long context leaves little else of a short haystack.
    """
    builder, rng, used = draft.builder, draft.rng, ""
    elsewhere = (builder.haystack.window(rng, 4 * size, builder.tokenizer) for _ in range(WINDOWS))
    for window in chain([draft.spare], elsewhere):
        words = builder.text(window).split()[1:]  # the first may be truncated
        while len(passage := builder.tokens(f" {' '.join(words[:size])}")[:size]) == size:
            text = builder.text(passage).strip()
            uncut = " ".join(words).startswith(text)  # no character is split
            if uncut and not draft.contains(text[:DISTINCT]) and text[:DISTINCT] not in used:
                used += text + LINE
                yield passage
            words = words[max(1, len(text.split())) :]


def list_reorder(draft: Draft) -> TaskSample:
    """Recall of a list from near the beginning, in reverse and in alphabetical order."""
    introduction, *orders = LISTS[draft.builder.split]
    builder, rng = draft.builder, draft.rng
    (name,) = draft.not_in_hay(draft.shuffled(builder.words.names), 1)
    words = rng.sample(builder.words.nouns, LIST_LENGTH)
    depth = 0.1 * rng.random()
    introduced = builder.tokens(LINE + introduction.format(name))
    statement = [*introduced, *builder.comma_separated(words), *builder.tokens(LINE)]
    questions = [
        draft.question(
            question.format(name), beginning.format(name), builder.comma_separated(answer), [", ".join(answer)], depth
        )
        for (question, beginning), answer in zip(orders, (words[::-1], sorted(words)), strict=True)
    ]
    return draft.scatter("", [(depth, statement)]), questions


def classification(draft: Draft) -> TaskSample:
    """Learning of meaningless labels from examples that fill the context.

    In-context learning with many examples (Bertsch et al. 2024, arXiv 2405.00200), of made-up words for four topics.
    The sentences in the questions are not among the examples.
    """
    head, text, beginning = TEXTS[draft.builder.split]
    tokens, rng = draft.builder.tokens, draft.rng
    labels = draft.builder.words.made_up(rng, QUESTIONS)
    answers = [tokens(f" {label}") for label in labels]
    topics = [
        draft.shuffled([remark.format(word) for remark in REMARKS[draft.builder.split] for word in words.split()])
        for words in TOPICS[draft.builder.split]
    ]

    def entries() -> Iterator[list[int]]:
        while True:  # one example of each label in random order
            for topic in rng.sample(range(QUESTIONS), QUESTIONS):
                example = text.format(rng.choice(topics[topic][1:])) + LINE + beginning
                yield [*tokens(example), *answers[topic], *tokens(BLANK_LINE)]

    context, _ = draft.fill(head, entries(), least=2 * QUESTIONS)
    questions = [
        draft.question(text.format(topics[topic][0]), beginning, answers[topic], [labels[topic]])
        for topic in rng.sample(range(QUESTIONS), QUESTIONS)
    ]
    return context, questions


def short(draft: Draft) -> TaskSample:
    """Recall over a few words, within any window: a control that no mask should harm."""
    statement, question, things = OWNERSHIP[draft.builder.split]
    tokens = draft.builder.tokens
    names = draft.shuffled([name for name in draft.builder.words.names if len(name) <= 4])
    belongings = draft.shuffled(things.split())
    pieces = [tokens(statement.format(name)) for name in names]
    answers = [tokens(f" {thing}") for thing in belongings]
    entries = ([*piece, *answer, *tokens(LINE)] for piece, answer in zip(pieces, answers, strict=False))
    context, count = draft.fill("", entries, least=2, apart=belongings)
    index = draft.rng.randrange(count)
    beginning, question_text = statement.format(names[index]), question.format(names[index])
    return context, [draft.question(question_text, beginning, answers[index], [belongings[index]])]
