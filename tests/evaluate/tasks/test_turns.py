"""Conversations ask the questions of their tasks in random order, within the template of a chat."""

import pytest

from duo_id.common.errors import UserError
from duo_id.data.chat import Chat
from duo_id.evaluate.metrics import METRICS
from duo_id.evaluate.tasks.names import GROUPS
from duo_id.evaluate.tasks.registry import make_items
from duo_id.evaluate.tasks.turns import TURNS
from tests.evaluate.tasks.making import AFTER, builder_of, items_of, length_of, some, text

TASKS = pytest.mark.parametrize("task", GROUPS["turns"])
BETWEEN = "[END]\n[USER]\n"


@TASKS
def test_there_are_six_questions_about_different_facts_of_the_context(task: str) -> None:
    for item, _, context in some(task):
        assert item.turns
        assert len({question.prompt for question in item.questions}) == len(item.questions) == TURNS == 6
        assert len({question.references for question in item.questions}) == TURNS
        for question in item.questions:
            (reference,) = question.references
            assert context.count(reference) == 1
            assert METRICS[item.metric](text(question.answer), question.references) == 1


@TASKS
def test_the_order_is_the_samples_own(task: str) -> None:
    orders = []
    for item in items_of(task, samples=4):
        depths = [question.depth or 0.0 for question in item.questions]
        assert len(set(depths)) == TURNS
        orders.append(tuple(sorted(range(TURNS), key=depths.__getitem__)))
    assert len(set(orders)) > 2


@TASKS
def test_a_template_stands_between_an_answer_and_the_next_question(task: str) -> None:
    tokens = builder_of().tokens
    chat = Chat(tuple(tokens("[USER]\n")), tuple(tokens(AFTER)), tuple(tokens(BETWEEN)))
    (item,) = make_items([task], builder_of(chat=chat), [length_of(task)], 1, 0, None, 3)
    first, *others = (text(question.prompt) for question in item.questions)
    assert first.startswith("\n\n")
    assert all(prompt.startswith(f"{BETWEEN}\n\n") and prompt.count(AFTER) == 1 for prompt in others)
    spare = Chat(chat.before, chat.after, None)
    with pytest.raises(UserError, match=r"takes no second message.*give chat_template=false"):
        make_items([task], builder_of(chat=spare), [length_of(task)], 1, 0, None, 3)


def test_mixed_conversations_ask_for_two_facts_of_each_kind() -> None:
    for item, _, _ in some("turns-mixed"):
        words = sorted(len(question.references[0].split()) for question in item.questions)
        assert words[:4] == [1, 1, 3, 3]
        assert words[4] > 7
