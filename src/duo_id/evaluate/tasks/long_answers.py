"""Answers of a few hundred tokens, line by line: a table in another form, a long list, sums with all their steps.

The first lines of each answer are given with the question and show its form. The others are judged one by one, whatever
their order, so that results tell where in an answer a cache lets go (see `duo_id.report.rows.THIRDS`).
"""

from collections.abc import Sequence
from itertools import accumulate

from duo_id.evaluate.tasks.building import LINE, Draft, TaskSample, evenly_spaced

GIVEN = 2  # lines
ROWS = 24  # of a table
LISTED = 32  # things of a list
SUMMED = 16  # numbers to add up

TABLES = {
    "development": (
        "Name | Home | Age",
        "Write all {count} rows of the table in words, from the first to the last, each on a line.",
        "{} of {}, aged {}",
    ),
    "test": (
        "Guest | Town | Room",
        "Read out the table's {count} entries from top to bottom, one to a line.",
        "{} from {} sleeps in {}",
    ),
}
LISTS = {
    "development": (
        "Some objects in this text belong to a museum.\n\n",
        "The museum owns one {}.",
        "List the {count} objects that the museum owns, in the order of the text, each on a line.",
    ),
    "test": (
        "Now and then this text mentions what a shop has for sale.\n\n",
        "For sale in the shop: one {}.",
        "Which {count} things are for sale in the shop? One thing to a line, as they come up.",
    ),
}
SUMS = {
    "development": (
        "Points are awarded in some places of this text.\n\n",
        "Round {}: {} points.",
        "Add up the points of rounds 1 to {count} in this order. Show each addition on a line.",
    ),
    "test": (
        "The text tells how many coins were put into a box, day by day.\n\n",
        "Day {}: {} coins into the box.",
        "How many coins are in the box after each of the days 1 to {count}? Calculate day by day, one sum to a line.",
    ),
}


def table_reformat(draft: Draft) -> TaskSample:
    """All rows of a table, in the order of the table and in words."""
    heading, question, form = TABLES[draft.builder.split]
    words, rng = draft.builder.words, draft.rng
    columns = rng.sample(words.names, ROWS), rng.sample(words.cities, ROWS), rng.sample(range(100, 1000), ROWS)
    rows = list(zip(*columns, strict=True))
    table = f"\n| {heading} |\n" + "".join(f"| {name} | {city} | {number} |\n" for name, city, number in rows)
    context = draft.scatter("", [(rng.random() / 2, draft.builder.tokens(table))])  # well before the question
    return _line_by_line(draft, context, question.format(count=ROWS), [form.format(*row) for row in rows])


def list_all(draft: Draft) -> TaskSample:
    """All things of a kind, scattered over the text and listed in its order."""
    head, sentence, question = LISTS[draft.builder.split]
    things = draft.not_in_hay(draft.builder.words.things(draft.rng, 2 * LISTED), LISTED)
    context = _scattered(draft, head, [sentence.format(thing) for thing in things])
    return _line_by_line(draft, context, question.format(count=LISTED), things)


def shown_work(draft: Draft) -> TaskSample:
    """The sum of numbers scattered over the text, step by step."""
    head, sentence, question = SUMS[draft.builder.split]
    numbers = [draft.rng.randrange(11, 100) for _ in range(SUMMED)]
    context = _scattered(draft, head, [sentence.format(*pair) for pair in enumerate(numbers, start=1)])
    sums = list(accumulate(numbers))
    steps = [f"{last} + {number} = {total}" for last, number, total in zip(sums, numbers[1:], sums[1:], strict=False)]
    return _line_by_line(draft, context, question.format(count=SUMMED), steps)


def _scattered(draft: Draft, head: str, sentences: Sequence[str]) -> list[int]:
    """A context with sentences all over it, in this order."""
    needles = [draft.builder.tokens(LINE + sentence + LINE) for sentence in sentences]
    return draft.scatter(head, zip(evenly_spaced(len(needles)), needles, strict=True))


def _line_by_line(draft: Draft, context: list[int], question: str, lines: Sequence[str]) -> TaskSample:
    """A question whose answer has these lines, the first of which are given."""
    given, others = lines[:GIVEN], lines[GIVEN:]
    answer = draft.builder.tokens(LINE + LINE.join(others))
    return context, [draft.question(question, LINE.join(given), answer, others)]
