"""Instructions stand behind a sink's reach, the right answers keep them, and others do not."""

import pytest

from duo_id.data.chat import Chat
from duo_id.evaluate.metrics import METRICS
from duo_id.evaluate.tasks.names import GROUPS
from duo_id.evaluate.tasks.registry import make_items
from duo_id.evaluate.tasks.rules import ANSWER
from tests.evaluate.tasks.making import AFTER, builder_of, items_of, length_of, some, text

TASKS = pytest.mark.parametrize("task", GROUPS["rules"])


@TASKS
def test_right_answers_keep_all_rules_and_name_facts_of_the_context(task: str) -> None:
    for item, split, context in some(task):
        for question in item.questions:
            answer = text(question.answer)
            assert METRICS["rules"](answer, question.references) == 1
            assert METRICS["rules"]("I do not know.", question.references) < 1
            for rule in question.references:
                _, _, word = rule.partition(" ")
                assert word in context, "the rule is told"
            if question.depth is not None and task != "rules-words":
                thing = " ".join(answer.rstrip('"} ').replace('"', " ").split(".")[0].split()[-2:])
                assert thing in context, split


@TASKS
def test_rules_stand_beyond_the_first_64_tokens(task: str) -> None:
    """Where the sink of any pattern would keep them."""
    for item in items_of(task, "smollm2", samples=4):
        first = text(item.context[:64], "smollm2")
        for question in item.questions:
            for rule in question.references:
                _, _, word = rule.partition(" ")
                assert not word or word not in first


@TASKS
@pytest.mark.parametrize("after", ["", AFTER], ids=["plain", "chat"])
def test_answers_begin_as_a_model_would(task: str, after: str) -> None:
    tokens = builder_of().tokens
    chat = Chat((), tuple(tokens(after)))
    (item,) = make_items([task], builder_of(chat=chat), [length_of(task)], 1, 0, None, 3)
    for question in item.questions:
        assert text(question.prompt).endswith(after or ANSWER)
        assert text(question.answer).startswith(" ") == (not after)
