"""The one place where generated tasks are named, and where their samples are made."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from duo_id.common.errors import UserError, check
from duo_id.evaluate.items import Item
from duo_id.evaluate.tasks import language, lookup, needles, ruler
from duo_id.evaluate.tasks.building import Draft, Made, SampleBuilder, TooShort
from duo_id.evaluate.tasks.ruler_data import RULER_DATA

ROOM = 96  # of almost all tasks, so that contexts of all of them have one size and can be read together
SHORT = 64  # tokens of a sample of the task short, beside those of the chat template
LONGBENCH = "python -m duo_id.lm_eval --model duo_id --model_args heads=RUN,sparsity=0.5 --tasks longbench"


@dataclass(frozen=True)
class EvaluationTask:
    """A task and the sizes of its questions, in tokens of an ordinary tokenizer.

    Attributes:
        name: what it is called in `tasks=`.
        make: the context and the questions of a draft.
        max_new_tokens: of a generated answer; 0: nothing is generated.
        metric: how a generated answer is judged, a key of `duo_id.evaluate.metrics.METRICS`.
        stop: what ends a generated answer.
        room: what a context leaves free for the longest question with its answer.
        length: of every sample, whatever lengths are asked for; None: those.
    """

    name: str
    make: Callable[[Draft], Made]
    max_new_tokens: int = 0
    metric: str = "exact"
    stop: str | None = "\n"
    room: int = ROOM
    length: int | None = None


EVALUATION_TASKS = {
    task.name: task
    for task in (
        EvaluationTask("needle-words", needles.needle_words, 14),
        EvaluationTask("needle-numbers", needles.needle_numbers, 10),
        EvaluationTask("needle-sentences", needles.needle_sentences, 30),
        EvaluationTask("passkeys", needles.passkeys, 10),
        EvaluationTask("ruler-single", ruler.single, 10),
        EvaluationTask("ruler-multikey", ruler.multikey, 10),
        EvaluationTask("ruler-multivalue", ruler.multivalue, 36, "all"),
        EvaluationTask("ruler-multiquery", ruler.multiquery, 36, "all"),
        EvaluationTask("ruler-variables", ruler.variables, 32, "all"),
        EvaluationTask("ruler-common-words", ruler.common_words, 44, "all"),
        EvaluationTask("ruler-frequent-words", ruler.frequent_words, 20, "all"),
        EvaluationTask("json-lookup", lookup.json_lookup, 8, stop='"'),
        EvaluationTask("copying", lookup.copying, 28),
        EvaluationTask("list-reorder", lookup.list_reorder, 28),
        EvaluationTask("classification", lookup.classification, 8),
        EvaluationTask("language", language.language, room=0),
        EvaluationTask("rare-ngrams", language.rare_ngrams, room=0),
        EvaluationTask("short", lookup.short, 5, room=24, length=SHORT),
    )
}
GROUPS = {
    "all": tuple(EVALUATION_TASKS),
    "needle": tuple(name for name in EVALUATION_TASKS if name.startswith("needle-")),
    "ruler": tuple(name for name in EVALUATION_TASKS if name.startswith("ruler-")),
    "lookup": ("passkeys", "json-lookup", "copying", "list-reorder", "classification"),
    "text": ("language", "rare-ngrams"),
}


def expand(names: Sequence[str]) -> list[EvaluationTask]:
    """The tasks that are named, by themselves or as a group, each once.

    Raises:
        UserError: a name is neither a task's nor a group's.
    """
    choices = ", ".join((*GROUPS, *EVALUATION_TASKS, RULER_DATA))
    for name in names:
        check(not name.startswith("longbench"), f"tasks={name}: LongBench is run by lm-eval: {LONGBENCH}")
        check(name in GROUPS or name in EVALUATION_TASKS, f"tasks: there is no {name}, choose among {choices}")
    return [
        EVALUATION_TASKS[task] for task in dict.fromkeys(task for name in names for task in GROUPS.get(name, (name,)))
    ]


def room(task: EvaluationTask, builder: SampleBuilder) -> int:
    """Tokens that a context of `task` leaves free for what follows it."""
    return builder.scaled(task.room) + len(builder.chat.after) if task.room else 0


def make_items(
    names: Sequence[str],
    builder: SampleBuilder,
    lengths: Sequence[int],
    samples: int,
    seed: int,
    limit: int | None,
    depths: int,
) -> list[Item]:
    """The samples of some tasks, each a function of seed, split, task, length and index.

    Args:
        names: tasks and groups of tasks.
        builder: what the samples share.
        lengths: tokens; all samples of a task and a length have contexts of the same number of tokens.
        samples: of each task and length.
        seed: of all samples.
        limit: the most tokens that the model takes; None: it names no limit.
        depths: needles of a context, in the tasks that go over a grid of depths.

    Raises:
        UserError: there is no such task, or a length is more than the model takes or less than a task needs.
    """
    check(1 <= depths <= needles.MOST, f"depths={depths} must be between 1 and {needles.MOST}")
    for length in lengths:
        check(
            limit is None or length <= limit,
            f"lengths={list(lengths)}: {length} exceeds the {limit} tokens that the model takes",
        )
    chat = len(builder.chat.before) + len(builder.chat.after)
    return [
        _item(task, builder, length, index, seed, depths)
        for task in expand(names)
        for length in ([builder.scaled(task.length) + chat] if task.length else lengths)
        for index in range(samples)
    ]


def _item(task: EvaluationTask, builder: SampleBuilder, length: int, index: int, seed: int, depths: int) -> Item:
    free = room(task, builder)
    rng = random.Random(f"{seed}:{builder.split}:{task.name}:{length}:{index}")
    draft = Draft(builder, rng, length - free, depths)
    try:
        if draft.size < 1:
            raise TooShort(1)
        context, questions = task.make(draft)
    except TooShort as error:
        raise UserError(
            f"lengths={length} is too short for {task.name}, which needs at least {error.needed + free} tokens here: "
            "raise it, or leave the task out of tasks"
        ) from error
    assert len(context) == draft.size
    new = builder.scaled(task.max_new_tokens) if task.max_new_tokens else 0
    for question in questions:
        needed = len(question.prompt) + max(len(question.answer), new) if question.place is None else 0
        check(
            needed <= free,
            f"tasks: a question of {task.name} takes {needed} tokens of this model's tokenizer, more than the {free} "
            "that are set aside: leave the task out",
        )
    return Item(task.name, length, index, tuple(context), tuple(questions), task.metric, new, task.stop)
