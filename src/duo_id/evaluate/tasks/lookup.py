"""What is to be found again exactly: values of keys, passages, lists, the labels of examples."""

from collections.abc import Iterator
from itertools import chain, islice

from duo_id.common.errors import check
from duo_id.evaluate.tasks.building import BLANK_LINE, LINE, Draft, Made, one_of_each_part

ASKED = 4  # questions of a context
PASSAGES, PASSAGE = 3, 24  # copying: passages, and tokens of each
UNLIKE = 40  # characters with which no passage begins that stands elsewhere too
WINDOWS = 100  # that are looked at for passages
LISTED = 6  # words of a list

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
OWNED = {
    "development": ("{} owns the", "What does {} own?", "kiln lute oboe fife dory yawl awl tuba mug sitar"),
    "test": ("{} sold the", "What was sold by {}?", "gong kayak lyre skis viola atlas banjo anvil abacus sundial"),
}


def json_lookup(draft: Draft) -> Made:
    """Whether a key's value is found among many alike in a JSON object (Liu et al. 2023, arXiv 2307.03172)."""
    head, question = JSON[draft.builder.split]
    tokens, words = draft.builder.tokens, draft.builder.words
    most = max(2 * ASKED, draft.size // 8)  # no entry has fewer tokens
    drawn = words.made_up(draft.rng, min(2 * most, words.num_made_up))
    keys, values = drawn[::2], drawn[1::2]

    def entries() -> Iterator[list[int]]:
        for number, (key, value) in enumerate(zip(keys, values, strict=False)):
            yield [*tokens(f'{"," if number else ""}\n"{key}": "'), *tokens(value), *tokens('"')]

    context, count = draft.fill(head, entries(), "\n}", least=2 * ASKED)
    questions = []
    for place in one_of_each_part(draft.rng, count, ASKED):
        key, value = keys[place], values[place]
        asked, beginning = question.format(f'"{key}"'), f'"{key}": "'
        questions.append(draft.question(asked, beginning, tokens(value), [value], place / (count - 1)))
    return context, questions


def copying(draft: Draft) -> Made:
    """Whether a passage of the text is copied word for word from where a name that stands there once marks it.

    What induction heads do (Olsson et al. 2022, arXiv 2209.11895), over a distance.
    """
    cue, question = COPYING[draft.builder.split]
    builder = draft.builder
    size = builder.scaled(PASSAGE)
    names = [name.capitalize() for name in builder.words.made_up(draft.rng, 3 * PASSAGES)]
    passages = list(islice(_passages(draft, size), PASSAGES))
    check(
        len(passages) == PASSAGES,
        "the haystack repeats itself, copying finds no passage that stands in it once: leave copying out of tasks or "
        "give another data.haystack",
    )
    needles, questions = [], []
    for number, (name, passage) in enumerate(zip(draft.absent(names, PASSAGES), passages, strict=True)):
        depth = (number + draft.rng.random()) / (PASSAGES + 1)  # none in the last part, which is near the question
        needles.append((depth, [*builder.tokens(LINE + cue.format(name)), *passage, *builder.tokens(LINE)]))
        reference = builder.text(passage).strip()
        questions.append(draft.question(question.format(name), cue.format(name), passage, [reference], depth))
    return draft.scatter("", needles), questions


def _passages(draft: Draft, size: int) -> Iterator[list[int]]:
    """Passages of so many tokens, each in one line, that the context's hay does not contain.

    They are what comes after the hay, and then from anywhere: of a short haystack a long context leaves little else.
    """
    builder, rng, told = draft.builder, draft.rng, ""
    elsewhere = (builder.haystack.window(rng, 4 * size, builder.tokenizer) for _ in range(WINDOWS))
    for window in chain([draft.spare], elsewhere):
        words = builder.text(window).split()[1:]  # the first may be cut
        while len(passage := builder.tokens(f" {' '.join(words[:size])}")[:size]) == size:
            text = builder.text(passage).strip()
            whole = " ".join(words).startswith(text)  # no character is cut
            if whole and not draft.contains(text[:UNLIKE]) and text[:UNLIKE] not in told:
                told += text + LINE
                yield passage
            words = words[max(1, len(text.split())) :]


def list_reorder(draft: Draft) -> Made:
    """Whether a list from near the beginning is known well enough to be told backwards, and sorted."""
    told, *orders = LISTS[draft.builder.split]
    builder, rng = draft.builder, draft.rng
    (name,) = draft.absent(draft.shuffled(builder.words.names), 1)
    words = rng.sample(builder.words.nouns, LISTED)
    depth = 0.1 * rng.random()
    statement = [*builder.tokens(LINE + told.format(name)), *builder.listed(words), *builder.tokens(LINE)]
    questions = [
        draft.question(
            question.format(name), beginning.format(name), builder.listed(answer), [", ".join(answer)], depth
        )
        for (question, beginning), answer in zip(orders, (words[::-1], sorted(words)), strict=True)
    ]
    return draft.scatter("", [(depth, statement)]), questions


def classification(draft: Draft) -> Made:
    """Whether labels that mean nothing are learned from examples that fill the context.

    In-context learning with many examples (Bertsch et al. 2024, arXiv 2405.00200), of made-up words for four topics.
    The sentences that are asked about are not among the examples.
    """
    head, text, beginning = TEXTS[draft.builder.split]
    tokens, rng = draft.builder.tokens, draft.rng
    labels = draft.builder.words.made_up(rng, ASKED)
    answers = [tokens(f" {label}") for label in labels]
    topics = [
        draft.shuffled([remark.format(word) for remark in REMARKS[draft.builder.split] for word in words.split()])
        for words in TOPICS[draft.builder.split]
    ]

    def entries() -> Iterator[list[int]]:
        while True:  # one of each label in random order, again and again
            for topic in rng.sample(range(ASKED), ASKED):
                example = text.format(rng.choice(topics[topic][1:])) + LINE + beginning
                yield [*tokens(example), *answers[topic], *tokens(BLANK_LINE)]

    context, _ = draft.fill(head, entries(), least=2 * ASKED)
    questions = [
        draft.question(text.format(topics[topic][0]), beginning, answers[topic], [labels[topic]])
        for topic in rng.sample(range(ASKED), ASKED)
    ]
    return context, questions


def short(draft: Draft) -> Made:
    """Whether what stands a few words before is told: shorter than any window, a control that no mask should harm."""
    statement, question, things = OWNED[draft.builder.split]
    tokens = draft.builder.tokens
    names = draft.shuffled([name for name in draft.builder.words.names if len(name) <= 4])
    owned = draft.shuffled(things.split())
    pieces = [tokens(statement.format(name)) for name in names]
    answers = [tokens(f" {thing}") for thing in owned]
    entries = ([*piece, *answer, *tokens(LINE)] for piece, answer in zip(pieces, answers, strict=False))
    context, count = draft.fill("", entries, least=2, apart=owned)
    place = draft.rng.randrange(count)
    beginning, asked = statement.format(names[place]), question.format(names[place])
    return context, [draft.question(asked, beginning, answers[place], [owned[place]])]
