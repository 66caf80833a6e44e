"""The training tasks by name."""

from collections.abc import Callable
from functools import partial

from transformers import PreTrainedTokenizerBase

from duo_id.data.copying import CopyingTask
from duo_id.data.disk import DiskTask
from duo_id.data.key_value import KeyValueTask
from duo_id.data.mixture import MixtureTask
from duo_id.data.multi_query import MultiQueryTask
from duo_id.data.passkey import PasskeyTask
from duo_id.data.samples import Task
from duo_id.data.settings import DataSettings
from duo_id.data.synthetic import DraftedTask
from duo_id.data.text import TextTask
from duo_id.data.turns import TurnsTask
from duo_id.data.written import WrittenTask

DRAFTED: dict[str, type[DraftedTask]] = {
    "passkey": PasskeyTask,
    "key_value": KeyValueTask,
    "copying": CopyingTask,
    "multi_query": MultiQueryTask,
    "text": TextTask,
    "turns": TurnsTask,
}
MIXED: dict[str, Callable[..., Task]] = {**DRAFTED, "self": WrittenTask}
TRAINING_TASKS: dict[str, Callable[..., Task]] = {**MIXED, "mixture": partial(MixtureTask, MIXED), "disk": DiskTask}


def make_task(
    settings: DataSettings, tokenizer: PreTrainedTokenizerBase, split: str, length_limit: int | None = None
) -> Task:
    """The task that `settings.task` names, for one split.

    Raises:
        UserError: it cannot make samples with these settings.
    """
    return TRAINING_TASKS[settings.task](settings, tokenizer, split, length_limit)
