"""The names of all published data sets, and their items."""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from duo_id.common.errors import UserError
from duo_id.evaluate.chat import Chat, plain
from duo_id.evaluate.items import Item
from duo_id.evaluate.published.building import Builder
from duo_id.evaluate.published.longbench import DATA_SETS, V2, read_longbench, read_longbench_v2
from duo_id.evaluate.published.ruler import RULER_TASKS, read_ruler

LONGBENCH, RULER = "longbench", "ruler-data"
PUBLISHED = {
    LONGBENCH: [f"{LONGBENCH}/{name}" for name in DATA_SETS],
    V2: [V2],
    RULER: [f"{RULER}/{name}" for name in RULER_TASKS],
}


def is_published(name: str) -> bool:
    """Whether a task's name means a published benchmark, or one of its data sets, known or not."""
    return name.partition("/")[0] in PUBLISHED


def published_names(names: Sequence[str]) -> list[str]:
    """The data sets that `names` mean, in this order, each once.

    Raises:
        UserError: there is no such data set; the message lists those of the benchmark.
    """
    found: list[str] = []
    for name in names:
        benchmark = name.partition("/")[0]
        known = PUBLISHED.get(benchmark, [])
        if name != benchmark and name not in known:
            choices = ", ".join(known or PUBLISHED)
            raise UserError(f"tasks={name}: no such data set, choose {benchmark} or among {choices}")
        found += known if name == benchmark else [name]
    return list(dict.fromkeys(found))


def published_items(
    names: Sequence[str],
    path: str | None,
    tokenizer: PreTrainedTokenizerBase,
    chat: Chat,
    limit: int | None,
    lengths: Sequence[int],
    samples: int,
) -> list[Item]:
    """Items of published data sets.

    A data set of LongBench has contexts of all lengths: they are read as they are, those that with question and answer
    exceed the largest of `lengths` truncated in the middle. RULER is read at each of `lengths`.

    Args:
        names: benchmarks, or single data sets such as longbench/qasper.
        path: a local folder with the data; None: the hub.
        tokenizer: of the model.
        chat: tokens around the user's message.
        limit: most tokens that the model takes; None: it names no limit.
        lengths: tokens, see above.
        samples: contexts of each data set and length, the first ones.

    Raises:
        UserError: a name is unknown, data is missing, or lengths do not fit.
    """
    builder = Builder(tokenizer, chat, plain(tokenizer))
    longest = min(max(lengths), limit or max(lengths))
    items: list[Item] = []
    for name in published_names(names):
        benchmark, _, part = name.partition("/")
        if benchmark == RULER:
            for length in lengths:
                if limit is not None and length > limit:
                    raise UserError(f"lengths={length} exceeds the {limit} tokens that the model takes: lower it")
                form, entries = read_ruler(part, path, length)
                items += builder.items(name, form, entries, samples, length, room=limit)
        else:
            form, entries = read_longbench(part, path) if benchmark == LONGBENCH else read_longbench_v2(path)
            items += builder.items(name, form, entries, samples, longest, longest)
    return items
