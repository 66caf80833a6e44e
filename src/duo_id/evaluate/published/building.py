"""From the texts of a published data set to items: tokens, truncated in the middle where they are too long."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice

from transformers import PreTrainedTokenizerBase

from duo_id.common.errors import UserError
from duo_id.data.haystack import tokenize
from duo_id.evaluate.chat import Chat
from duo_id.evaluate.items import Item, Question


@dataclass(frozen=True)
class Entry:
    """One row of a data set, as text.

    Attributes:
        head: what stands before the context: instructions.
        context: what is long, and may be cut.
        question: what follows the context and belongs to the user's message.
        references: what answers are judged against; the first that is not blank is the teacher-forced answer.
        cue: the beginning of the answer, which the model goes on from.
    """

    head: str
    context: str
    question: str
    references: tuple[str, ...]
    cue: str = ""


@dataclass(frozen=True)
class Form:
    """What all items of a data set share: see `Item` for the last three.

    Attributes:
        chat: False: never put into a chat template.
    """

    metric: str
    max_new_tokens: int
    stop: str | None = None
    chat: bool = True


@dataclass(frozen=True)
class Builder:
    """Makes items out of entries.

    Attributes:
        tokenizer: of the model.
        chat: around the user's message.
        plain: the same without a template.
    """

    tokenizer: PreTrainedTokenizerBase
    chat: Chat
    plain: Chat

    def items(
        self, task: str, form: Form, entries: Iterable[Entry], samples: int, length: int, room: int | None
    ) -> list[Item]:
        """The first `samples` contexts with all their questions.

        Args:
            task: the data set's name.
            form: what all items share.
            entries: those with the same head and context become questions of one item.
            samples: contexts.
            length: what items say their length is.
            room: tokens that context, question and answer must fit; None: no limit.

        Raises:
            UserError: an entry has no answer, or its question and answer leave no room for the context.
        """
        groups: dict[tuple[str, str], list[Entry]] = {}
        for entry in entries:
            groups.setdefault((entry.head, entry.context), []).append(entry)
        first = islice(groups.values(), samples)
        return [self._item(task, form, index, group, length, room) for index, group in enumerate(first)]

    def _item(self, task: str, form: Form, index: int, entries: Sequence[Entry], length: int, room: int | None) -> Item:
        chat = self.chat if form.chat else self.plain
        try:
            questions = tuple(self._question(entry, chat) for entry in entries)
            needed = max(len(x.prompt) + max(len(x.answer), form.max_new_tokens) for x in questions)
            head = [*chat.before, *tokenize(self.tokenizer, entries[0].head)]
            context = tokenize(self.tokenizer, entries[0].context)
            tail = max(len(x.prompt) for x in questions)
            kept = cut_middle(head, context, tail, None if room is None else room - needed)
        except UserError as error:
            raise UserError(f"tasks={task}, sample {index}: {error}") from None
        return Item(task, length, index, kept, questions, form.metric, form.max_new_tokens, form.stop)

    def _question(self, entry: Entry, chat: Chat) -> Question:
        answer = next((text for text in entry.references if text.strip()), None)
        if answer is None:
            raise UserError("the data names no answer")
        # An assistant's turn begins without a blank.
        cue = entry.cue.lstrip() if chat.after else _gap(entry.question) + entry.cue.lstrip() if entry.cue else ""
        gap = _gap(cue or ("" if chat.after else entry.question))
        prompt = [*tokenize(self.tokenizer, entry.question), *chat.after, *tokenize(self.tokenizer, cue)]
        if not prompt:
            raise UserError("nothing stands after the context in its prompt")
        return Question(tuple(prompt), tuple(tokenize(self.tokenizer, gap + answer)), entry.references)


def _gap(text: str) -> str:
    """What separates a Latin word from `text` before it: a blank, unless there is one or a bracket opens."""
    return " " if re.search(r"[A-Za-z0-9:.?!)]\Z", text) else ""


def cut_middle(head: Sequence[int], context: Sequence[int], tail: int, room: int | None) -> tuple[int, ...]:
    """Head and context within `room` tokens, less what is in the middle of the whole prompt.

    LongBench truncates so (arXiv 2308.14508, section 4.1), since instructions stand at both ends; here the cut is moved
    where it would otherwise take away of head or tail.

    Args:
        head: tokens that stay.
        context: tokens of which the middle may go.
        tail: how many tokens of the prompt follow.
        room: tokens; None: no limit.

    Raises:
        UserError: nothing of the context would be left.
    """
    excess = 0 if room is None else len(head) + len(context) - room
    if room is None or excess <= 0:
        return (*head, *context)
    if excess >= len(context):
        raise UserError("instructions, question and answer leave no room for the context: raise lengths")
    begin = min(max((room + tail) // 2 - len(head), 0), len(context) - excess)
    return (*head, *context[:begin], *context[begin + excess :])
