"""RULER (Hsieh et al. 2024, arXiv 2404.06654) as published: data from its authors' scripts, at fixed lengths."""

import re
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from duo_id.common.errors import check
from duo_id.data.haystack import tokenize
from duo_id.evaluate.chat import Chat
from duo_id.evaluate.items import Item, Question
from duo_id.evaluate.tasks.ruler_files import Sample, read_ruler

RULER_DATA = "ruler-data"
# The 13 tasks of the authors' synthetic.yaml; the metric and number of new tokens of each kind from their constants.py.
RULER_TASKS = (
    "niah_single_1 niah_single_2 niah_single_3 niah_multikey_1 niah_multikey_2 niah_multikey_3 niah_multivalue "
    "niah_multiquery vt cwe fwe qa_1 qa_2"
).split()
METRICS = {"niah": ("all", 128), "vt": ("all", 30), "cwe": ("all", 120), "fwe": ("all", 50), "qa": ("any", 32)}


def is_ruler_data(name: str) -> bool:
    """Whether a task's name refers to RULER's data or a part of it, even one that does not exist."""
    return name.partition("/")[0] == RULER_DATA


def expand_ruler(names: Sequence[str]) -> list[str]:
    """RULER's names of the tasks that `names` refer to, in order and without duplicates.

    Raises:
        UserError: there is no such task; the message lists all tasks.
    """
    tasks: list[str] = []
    for name in names:
        task = name.removeprefix(RULER_DATA).removeprefix("/")
        choices = ", ".join(f"{RULER_DATA}/{choice}" for choice in RULER_TASKS)
        check(
            name == RULER_DATA or task in RULER_TASKS,
            f"tasks={name}: no such data set, choose {RULER_DATA} or {choices}",
        )
        tasks += RULER_TASKS if name == RULER_DATA else [task]
    return list(dict.fromkeys(tasks))


def ruler_items(
    names: Sequence[str],
    folder: str | None,
    tokenizer: PreTrainedTokenizerBase,
    chat: Chat,
    limit: int | None,
    lengths: Sequence[int],
    samples: int,
) -> list[Item]:
    """Items of RULER's data.

    Args:
        names: ruler-data, or single tasks such as ruler-data/vt.
        folder: a local folder with the data; None: the hub.
        tokenizer: of the model.
        chat: tokens around the user's message.
        limit: most tokens that the model takes; None: unlimited.
        lengths: in tokens, as in the names of the data's folders.
        samples: number of samples to use of each task and length.

    Raises:
        UserError: a name is unknown, data is missing, or a sample does not fit the model.
    """
    for length in lengths:
        fits = limit is None or length <= limit
        check(fits, f"lengths={length} exceeds the {limit} tokens that the model takes: lower it")
    items = []
    for task in expand_ruler(names):
        metric, max_new_tokens = METRICS[task.partition("_")[0]]
        for length in lengths:
            rows = read_ruler(task, folder, length)
            new = rows[0].max_new_tokens or max_new_tokens
            for index, sample in enumerate(rows[:samples]):
                where = f"tasks={RULER_DATA}/{task}, lengths={length}, sample {index}"
                context, question = _tokenize_sample(sample, tokenizer, chat, where)
                needed = len(context) + len(question.prompt) + max(len(question.answer), new)
                check(
                    limit is None or needed <= limit,
                    f"{where} takes {needed} tokens of this model's tokenizer, more than the {limit} that the model "
                    "takes: lower lengths, or generate the data with this tokenizer, see docs/benchmarks.md",
                )
                items.append(Item(f"{RULER_DATA}/{task}", length, index, context, (question,), metric, new, stop=None))
    return items


def _tokenize_sample(
    sample: Sample, tokenizer: PreTrainedTokenizerBase, chat: Chat, where: str
) -> tuple[tuple[int, ...], Question]:
    """The context and the question about it, tokenised separately."""
    check(bool(sample.references), f"{where}: the data has no answer")
    cue = sample.cue.lstrip()
    if cue and not chat.after:  # the assistant's turn in a chat begins without a space
        cue = _gap(sample.question) + cue
    gap = _gap(cue or ("" if chat.after else sample.question))
    prompt = [*tokenize(tokenizer, sample.question), *chat.after, *tokenize(tokenizer, cue)]
    context = (*chat.before, *tokenize(tokenizer, sample.context))
    check(bool(prompt and context), f"{where}: the data has no context or no question")
    return context, Question(tuple(prompt), tuple(tokenize(tokenizer, gap + sample.references[0])), sample.references)


def _gap(text: str) -> str:
    """The separator between `text` and a Latin word after it: a space, unless it ends in one or an opening bracket."""
    return " " if re.search(r"[A-Za-z0-9:.?!)]\Z", text) else ""
