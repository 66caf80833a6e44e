"""The registry of generated tasks, and the generation of their samples."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from duo_id.common.errors import UserError, check
from duo_id.evaluate.items import Item
from duo_id.evaluate.tasks import language, long_answers, lookup, needles, ruler, rules
from duo_id.evaluate.tasks.building import BLANK_LINE, Draft, SampleBuilder, TaskSample, TooShort
from duo_id.evaluate.tasks.names import GROUPS, check_generated
from duo_id.evaluate.tasks.turns import TURNS, in_turns

RESERVED_TOKENS = 96  # the same for almost all tasks, so that their contexts share a size and are read together
WRITING_TOKENS = 480  # the same for conversations and long answers
SHORT = 64  # tokens of a sample of the task short, without those of the chat template


@dataclass(frozen=True)
class EvaluationTask:
    """A task and the sizes of its questions, in tokens of an ordinary tokenizer.

    Attributes:
        name: its name in `tasks=`.
        make: builds context and questions from a draft.
        max_new_tokens: of a generated answer; 0: nothing is generated.
        metric: how a generated answer is judged, a key of `duo_id.evaluate.metrics.METRICS`.
        stop: text that ends a generated answer.
        room: tokens reserved for the longest question with its answer; in turns, for all of them.
        length: of every sample, regardless of the requested lengths; None: the requested ones.
        turns: the questions are those of one conversation.
    """

    name: str
    make: Callable[[Draft], TaskSample]
    max_new_tokens: int = 0
    metric: str = "exact"
    stop: str | None = "\n"
    room: int = RESERVED_TOKENS
    length: int | None = None
    turns: bool = False


def _turns(name: str, make: Callable[[Draft], TaskSample], max_new_tokens: int, stop: str = "\n") -> EvaluationTask:
    return EvaluationTask(name, in_turns(make), max_new_tokens, stop=stop, room=WRITING_TOKENS, turns=True)


def _long(name: str, make: Callable[[Draft], TaskSample], max_new_tokens: int) -> EvaluationTask:
    return EvaluationTask(name, make, max_new_tokens, "lines", BLANK_LINE, WRITING_TOKENS)


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
        _turns("turns-words", needles.needle_words, 14),
        _turns("turns-numbers", needles.needle_numbers, 10),
        _turns("turns-json", partial(lookup.json_lookup, num_questions=TURNS), 8, '"'),
        _turns("turns-mixed", needles.mixed, 30),
        EvaluationTask("rules-json", rules.rules_json, 40, "rules", BLANK_LINE),
        EvaluationTask("rules-codeword", rules.rules_codeword, 40, "rules", BLANK_LINE),
        EvaluationTask("rules-words", rules.rules_words, 40, "rules", BLANK_LINE),
        _long("table-reformat", long_answers.table_reformat, 400),
        _long("list-all", long_answers.list_all, 240),
        _long("shown-work", long_answers.shown_work, 260),
    )
}


def expand(names: Sequence[str]) -> list[EvaluationTask]:
    """The tasks named, individually or as a group, each once.

    Raises:
        UserError: a name is neither a task nor a group.
    """
    check_generated(names)
    return [
        EVALUATION_TASKS[task] for task in dict.fromkeys(task for name in names for task in GROUPS.get(name, (name,)))
    ]


def reserved_tokens(task: EvaluationTask, builder: SampleBuilder) -> int:
    """Tokens that a context of `task` leaves free for question and answer."""
    chat = len(builder.chat.after) + task.turns * (TURNS - 1) * len(builder.chat.after + (builder.chat.between or ()))
    return builder.scaled(task.room) + chat if task.room else 0


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
        samples: per task and length.
        seed: of all samples.
        limit: the model's context length in tokens; None: it states none.
        depths: needles per context, in tasks over a grid of depths.

    Raises:
        UserError: there is no such task, or a length exceeds the model's or is too short for a task.
    """
    check(1 <= depths <= needles.MAX_NEEDLES, f"depths={depths} must be between 1 and {needles.MAX_NEEDLES}")
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
    reserved = reserved_tokens(task, builder)
    rng = random.Random(f"{seed}:{builder.split}:{task.name}:{length}:{index}")
    draft = Draft(builder, rng, length - reserved, depths)
    try:
        if draft.size < 1:
            raise TooShort(1)
        context, questions = task.make(draft)
    except TooShort as error:
        raise UserError(
            f"lengths={length} is too short for {task.name}, which needs at least {error.needed + reserved} tokens "
            "here: raise it, or leave the task out of tasks"
        ) from error
    assert len(context) == draft.size
    max_new_tokens = builder.scaled(task.max_new_tokens) if task.max_new_tokens else 0
    sizes = [len(question.prompt) + max(len(question.answer), max_new_tokens) for question in questions]
    sizes = [0 if question.place is not None else size for question, size in zip(questions, sizes, strict=True)]
    needed, asked = (sum(sizes), "the conversation") if task.turns else (max(sizes), "a question")
    check(
        needed <= reserved,
        f"tasks: {asked} of {task.name} takes {needed} tokens of this model's tokenizer, more than the {reserved} "
        "reserved for it: leave the task out",
    )
    judged = task.metric, max_new_tokens, task.stop, task.turns
    return Item(task.name, length, index, tuple(context), tuple(questions), *judged)
