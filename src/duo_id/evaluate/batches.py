"""Which contexts are read together, how much work that is, and after which of their questions a model writes."""

from collections.abc import Sequence

from duo_id.common.errors import UserError, check
from duo_id.evaluate.items import Item

GENERATED = 32  # tokens of a context that take as long as one that is generated


def batches(items: Sequence[Item], batch_tokens: int) -> list[list[Item]]:
    """Items grouped into batches, regardless of their task: at most `batch_tokens` tokens, or one item.

    Contexts in a batch have the same number of tokens. Those with answers inside are kept separate: they need more
    logits.
    """
    groups: dict[tuple[int, int, bool], list[Item]] = {}
    for item in items:
        in_context = any(question.place is not None for question in item.questions)
        groups.setdefault((item.length, len(item.context), in_context), []).append(item)
    grouped = []
    for (length, _, _), group in groups.items():
        size = max(1, batch_tokens // length)
        grouped += [group[start : start + size] for start in range(0, len(group), size)]
    return grouped


def work(items: Sequence[Item], generate: bool, write: int = 0) -> int:
    """Tokens of the contexts plus those that may be generated, weighted: a proxy for the time that a batch takes.

    Conversations are held token by token, questions and all, whether or not other answers are generated.
    """
    generated = [item.max_new_tokens * len(item.questions) for item in items if generate or item.turns]
    generated += [len(question.prompt) for item in items if item.turns for question in item.questions]
    generated += [write for item in items if first_following(item) is not None]
    return sum(len(item.context) for item in items) + GENERATED * sum(generated)


def first_following(item: Item) -> int | None:
    """The number of the first question that follows the context; None: the answers are all inside it."""
    return next((number for number, question in enumerate(item.questions) if question.place is None), None)


def check_room_to_write(write: int, items: Sequence[Item], limit: int | None) -> None:
    """Raise a `UserError` if no item has a question to write after, or a text ends beyond what the model can read.

    Args:
        write: tokens of a text at most.
        items: all that are read.
        limit: of the model, in tokens.
    """
    longest = max((item.length for item in items if first_following(item) is not None), default=None)
    if longest is None:
        tasks = ", ".join(dict.fromkeys(item.task for item in items))
        raise UserError(f"write={write}: all answers of {tasks} are inside the context")
    check(
        limit is None or longest + write <= limit,
        f"write={write}: after {longest} tokens the model's limit of {limit} leaves no room: lower lengths or write",
    )
