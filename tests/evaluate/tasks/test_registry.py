import random
import re
from collections.abc import Sequence

import pytest

from duo_id.common.errors import UserError
from duo_id.data.chat import Chat, plain, split_chat
from duo_id.evaluate.items import SPLITS
from duo_id.evaluate.metrics import METRICS
from duo_id.evaluate.tasks.names import GROUPS
from duo_id.evaluate.tasks.registry import EVALUATION_TASKS, expand, make_items, reserved_tokens
from tests.evaluate.tasks.making import AFTER, ASKED, LENGTHS, builder_of, items_of, length_of, text, tokenizer_of
from tests.support.pairs import pairwise

ALL = pytest.mark.parametrize("task", EVALUATION_TASKS)


@pairwise(task=EVALUATION_TASKS, tokenizer=LENGTHS, split=SPLITS)
def test_contexts_have_the_exact_length_and_leave_room_for_the_answer(task: str, split: str, tokenizer: str) -> None:
    builder = builder_of(tokenizer, split)
    (item,) = items_of(task, tokenizer, split)
    free, taken = reserved_tokens(EVALUATION_TASKS[task], builder), []
    assert item.task == task
    assert len(item.context) + free == item.length
    assert item.length == length_of(task, tokenizer) or task == "short"
    assert item.questions
    for question in item.questions:
        assert question.answer
        if question.place is None:
            taken.append(len(question.prompt) + max(len(question.answer), item.max_new_tokens))
            assert len(question.answer) <= item.max_new_tokens
            assert question.references
        else:
            assert item.context[question.place :][: len(question.answer)] == question.answer
            assert question.place >= 1
            assert not question.prompt
    assert (sum(taken) if item.turns else max(taken, default=0)) <= free


@pairwise(task=ASKED, tokenizer=LENGTHS, split=SPLITS)
def test_right_answers_are_right_and_stand_in_the_context(task: str, split: str, tokenizer: str) -> None:
    (item,) = items_of(task, tokenizer, split)
    context = text(item.context, tokenizer)
    for question in item.questions:
        answer = text(question.answer, tokenizer)
        assert METRICS[item.metric](answer, question.references) == 1
        if task != "list-reorder":
            assert all(reference in context for reference in question.references)
        if len(question.references) == 1 and task not in ("list-reorder", "classification"):
            starts_found = [start for start in range(len(item.context)) if starts(item.context, question.answer, start)]
            assert len(starts_found) == 1, "the answer's tokens stand in the context once"


def starts(tokens: Sequence[int], piece: Sequence[int], start: int) -> bool:
    return tuple(tokens[start : start + len(piece)]) == tuple(piece)


@pytest.mark.parametrize("task", ASKED)
def test_prompts_end_with_the_beginning_of_an_answer_that_goes_on_with_a_space(task: str) -> None:
    for split in SPLITS:
        (item,) = items_of(task, split=split)
        for question in item.questions:
            question_text, _, beginning = text(question.prompt).rpartition("\n")
            assert question_text.startswith("\n\n")
            assert beginning
            assert beginning == beginning.strip()
            assert text(question.answer).startswith(" ") != (task == "json-lookup")


@ALL
def test_a_sample_depends_on_its_own_coordinates_alone(task: str) -> None:
    def made(seed: int = 0, split: str = "test", samples: int = 2) -> list[object]:
        random.seed(seed)  # the global generator must not matter
        items = make_items([task], builder_of(split=split), [length_of(task)], samples, seed, None, 3)
        return [(item.context, item.questions) for item in items]

    first, second = made()
    assert made(samples=1) == [first]
    assert (
        make_items(["short", task], builder_of(), [length_of(task)], 2, 0, None, 3)[-1] == items_of(task, samples=2)[1]
    )
    others = [second, *made(seed=1, samples=1), *made(split="development", samples=1)]
    assert all(other != first for other in others)
    assert len({repr(other) for other in others}) == len(others)


@ALL
def test_contexts_of_one_task_and_length_have_one_length(task: str) -> None:
    assert len({len(item.context) for item in items_of(task, samples=4)}) == 1


@pytest.mark.parametrize("task", ASKED)
def test_chat_stands_around_context_and_question(task: str) -> None:
    tokens = builder_of().tokens
    chat = Chat(tuple(tokens("[USER]\n")), tuple(tokens(AFTER)))
    (item,) = make_items([task], builder_of(chat=chat), [2600], 1, 0, None, 3)
    assert text(item.context).startswith("[USER]\n")
    for question in item.questions:
        question_text, _, beginning = text(question.prompt).partition(AFTER)
        assert question_text.startswith("\n\n")
        assert not question_text.endswith("\n")
        assert beginning
    assert len(item.context) + reserved_tokens(EVALUATION_TASKS[task], builder_of(chat=chat)) == item.length


@pytest.mark.parametrize("name", LENGTHS)
def test_contexts_begin_as_the_tokenizer_wants(name: str) -> None:
    first = plain(tokenizer_of(name)).before
    assert bool(first) == (name not in ("smollm2",))
    assert all(items_of(task, name)[0].context[: len(first)] == first for task in EVALUATION_TASKS)


def test_all_tasks_fit_in_512_tokens_with_a_chat_template() -> None:
    items = make_items(["all"], builder_of("smollm2", chat=split_chat(tokenizer_of("smollm2"))), [512], 2, 0, None, 5)
    assert len(items) == 2 * len(GROUPS["all"])


def test_short_is_short_and_there_once_a_sample() -> None:
    items = make_items(["short"], builder_of("smollm2"), [512, 1024], 2, 0, None, 5)
    assert [(item.length, item.index) for item in items] == [(64, 0), (64, 1)]


def test_groups_and_names_expand_once_in_their_order() -> None:
    assert [task.name for task in expand(["needle", "copying", "needle-words"])] == [*GROUPS["needle"], "copying"]
    assert [task.name for task in expand(["all", "writing"])] == list(EVALUATION_TASKS)
    assert GROUPS["writing"] == (*GROUPS["turns"], *GROUPS["rules"], *GROUPS["long"])
    assert len(GROUPS["all"]) == 18, "those of published tables"
    assert {name for group in GROUPS.values() for name in group} == EVALUATION_TASKS.keys()
    assert len(GROUPS["ruler"]) == 7


@pytest.mark.parametrize(
    ("names", "lengths", "limit", "depths", "message"),
    [
        (
            ["needles"],
            [2600],
            None,
            3,
            "tasks: there is no needles, choose among all, needle, .*, needle-words, .* short.*, did you mean needle",
        ),
        (["copying"], [2600, 9000], 8192, 3, r"lengths=\[2600, 9000\]: 9000 exceeds the 8192 tokens"),
        (["needle"], [2600], None, 0, "depths=0 must be between 1 and"),
        (["needle"], [2600], None, 41, "depths=41 must be between 1 and"),
    ],
)
def test_wrong_settings_are_named(
    names: list[str], lengths: list[int], limit: int | None, depths: int, message: str
) -> None:
    with pytest.raises(UserError, match=message) as caught:
        make_items(names, builder_of(), lengths, 1, 0, limit, depths)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("task", [name for name in EVALUATION_TASKS if name != "short"])
def test_too_short_lengths_say_what_is_needed(task: str) -> None:
    needed = 10
    while not (refused := refusal(task, needed)).startswith("made"):
        match = re.match(rf"lengths={needed} is too short for {task}, which needs at least (\d+) tokens here", refused)
        assert match, refused
        assert needed < int(match[1]) < 0.9 * length_of(task)
        needed = int(match[1])
    make_items([task], builder_of(), [needed + 300], 2, 0, None, 3)


def refusal(task: str, length: int) -> str:
    """The error for samples of a length, if there is one."""
    try:
        return f"made {len(make_items([task], builder_of(), [length], 1, 0, None, 3))}"
    except UserError as error:
        return str(error)


def test_a_tokenizer_with_longer_questions_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("duo_id.evaluate.tasks.building.SampleBuilder.scaled", lambda _, tokens: tokens)
    with pytest.raises(UserError, match=r"a question of copying takes .* more than the 96 reserved for it"):
        make_items(["copying"], builder_of(), [2600], 1, 0, None, 3)
