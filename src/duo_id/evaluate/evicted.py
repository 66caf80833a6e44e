"""Answers after token eviction, which takes place once the context is read, or right before an answer inside it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch

from duo_id.deploy.eviction import Eviction
from duo_id.evaluate.answers import Answers
from duo_id.evaluate.batches import batches
from duo_id.evaluate.items import Item, Question
from duo_id.evaluate.reading import Reader


def read_evicted(
    reader: Reader,
    items: Sequence[Item],
    how: Callable[[int], Eviction],
    generate: bool,
    write: int = 0,
    texts: Mapping[Item, Sequence[int]] | None = None,
) -> list[Answers]:
    """Answer all questions of items whose contexts have the same number of tokens; see `Reader.read`.

    An answer inside the context is that of a question that follows a shorter one: what comes before is read, but for
    the token in front, tokens are evicted, and then that token predicts the answer. Each such place is a reading.

    Args:
        reader: of a model under a mask.
        items: a batch.
        how: what stays of a context of so many tokens.
        generate: also generate answers.
        write: tokens to write freely.
        texts: to follow.
    """
    following = [
        replace(item, questions=tuple(question for question in item.questions if question.place is None))
        for item in items
    ]
    texts = {following[items.index(item)]: text for item, text in (texts or {}).items()}
    read = reader.read(following, generate, write, texts, evict=how(len(items[0].context)))
    answers, inside = [], dict[int, tuple[int, int]]()
    pieces: list[Item] = []
    for row, (item, whole) in enumerate(zip(items, read, strict=True)):
        found = replace(whole, logits=[], generated=[], total_bytes=[])
        given = zip(whole.logits, whole.generated, whole.total_bytes, strict=True)
        for number, question in enumerate(item.questions):
            logits, generated, size = next(given) if question.place is None else (torch.empty(0), None, None)
            found.logits.append(logits)
            found.generated.append(generated)
            found.total_bytes.append(size)
            if question.place is not None:
                pieces.append(_before(item, question, question.place))
                inside[id(pieces[-1])] = row, number
        answers.append(found)
    for batch in batches(pieces, reader.batch_tokens):
        for piece, answered in zip(batch, reader.read(batch, False, evict=how(len(batch[0].context))), strict=True):
            row, number = inside[id(piece)]
            answers[row].logits[number] = answered.logits[0]
    return answers


def _before(item: Item, question: Question, place: int) -> Item:
    """The context before an answer inside it; the last token before it becomes the question."""
    assert place > 1, "nothing is left to read"
    asked = replace(question, prompt=(item.context[place - 1],), place=None)
    return replace(item, context=item.context[: place - 1], questions=(asked,))
