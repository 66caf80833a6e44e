"""Long answers: all their lines follow from the context, and are judged one by one."""

import re

import pytest

from duo_id.evaluate.metrics import METRICS
from duo_id.evaluate.tasks.long_answers import GIVEN, LISTED, ROWS, SUMMED
from duo_id.evaluate.tasks.names import GROUPS
from tests.evaluate.tasks.making import some, text


@pytest.mark.parametrize("task", GROUPS["long"])
def test_right_answers_have_all_lines_and_the_first_are_given(task: str) -> None:
    for item, _, _ in some(task):
        (question,) = item.questions
        answer = text(question.answer)
        assert answer.startswith("\n")
        assert answer.split("\n")[1:] == list(question.references)
        assert METRICS[item.metric](answer, question.references) == 1
        assert len(question.references) == {"table-reformat": ROWS, "list-all": LISTED}.get(task, SUMMED - 1) - GIVEN
        given = text(question.prompt).split("\n")[-GIVEN:]
        assert not {*given} & {*question.references}


def test_rows_are_those_of_the_table() -> None:
    for item, _, context in some("table-reformat"):
        (question,) = item.questions
        rows = re.findall(r"^\| (\w+) \| (\w+) \| (\d+) \|$", context, re.MULTILINE)
        assert len(rows) == ROWS
        for row, reference in zip(rows[GIVEN:], question.references, strict=True):
            assert all(cell in reference for cell in row)


def test_things_are_listed_in_the_order_of_the_text() -> None:
    for item, _, context in some("list-all"):
        (question,) = item.questions
        places = [context.index(f"one {thing}.") for thing in question.references]
        assert places == sorted(places)


def test_sums_add_up() -> None:
    for item, _, context in some("shown-work"):
        (question,) = item.questions
        numbers = [int(number) for number in re.findall(r"^(?:Round|Day) \d+: (\d+) ", context, re.MULTILINE)]
        assert len(numbers) == SUMMED
        for step, number in zip(question.references, numbers[GIVEN + 1 :], strict=True):
            last, added, total = map(int, re.findall(r"\d+", step))
            assert (last + added, added) == (total, number)
        assert total == sum(numbers)
