"""Several questions about one context, asked one after another in a conversation that keeps the model's answers.

A cache that suits a first question may fail a second about another part of the context (SCBench, Li et al. 2024, arXiv
2412.10319). Each task asks the questions of an ordinary one, in random order.
"""

from collections.abc import Callable
from dataclasses import replace

from duo_id.common.errors import check
from duo_id.evaluate.tasks.building import Draft, TaskSample

TURNS = 6


def in_turns(make: Callable[[Draft], TaskSample]) -> Callable[[Draft], TaskSample]:
    """A task with the contexts of another one, whose questions are the turns of a conversation.

    Args:
        make: of the other task; it asks `TURNS` questions where a draft has as many depths.
    """

    def made(draft: Draft) -> TaskSample:
        between = draft.builder.chat.between
        check(
            between is not None,
            "chat_template=true: the model's template takes no second message, as tasks of turns need: leave them out "
            "of tasks or give chat_template=false",
        )
        assert between is not None
        context, questions = make(replace(draft, depths=TURNS))
        first, *others = draft.rng.sample(questions, len(questions))
        assert len(others) == TURNS - 1
        return context, [first, *(replace(question, prompt=(*between, *question.prompt)) for question in others)]

    return made
