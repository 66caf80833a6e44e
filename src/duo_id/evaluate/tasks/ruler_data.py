"""RULER (Hsieh et al. 2024, arXiv 2404.06654) as published: data from its authors' scripts, at fixed lengths."""

import re
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from duo_id.common.errors import check
from duo_id.data.chat import Chat
from duo_id.data.haystack import tokenize
from duo_id.evaluate.items import Item, Question
from duo_id.evaluate.tasks.names import RULER_DATA, expand_ruler
from duo_id.evaluate.tasks.ruler_files import Sample, read_ruler

# The metric and number of new tokens of each kind, from the authors' constants.py.
METRICS = {"niah": ("all", 128), "vt": ("all", 30), "cwe": ("all", 120), "fwe": ("all", 50), "qa": ("any", 32)}


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
