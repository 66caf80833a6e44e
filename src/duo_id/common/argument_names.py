"""Messages that name overrides of the command line, in the words of the functions that Python programs call."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

from duo_id.common.errors import UserError

ARGUMENTS = {  # text in messages -> what a Python program passes; the first that matches counts
    "data.length_max (lengths, in an evaluation)": "lengths",
    "data.length_min": "lengths[0]",
    "data.length_max": "lengths[1]",
    "trainer.max_steps": "steps",
    "trainer.enable_progress_bar": "progress",
    "data/haystack": "data.haystack.source",
    "+model.config.sliding_window=null": "sliding_window=None in the model's config",
    "method.name": "method",
    "method@method.": "",  # a method's setting that is another method
    "method.": "",  # settings of the method are arguments
}
_OVERRIDES = re.compile(
    "|".join(rf"(?<![\w.]){re.escape(name)}" + ("" if name.endswith(".") else r"(?![\w.])") for name in ARGUMENTS)
)


def argument_names(message: str) -> str:
    """A message with the arguments of `duo_id.identify` and `duo_id.evaluate_pattern` in place of overrides.

    Overrides without an argument stay: they are passed by the same name.
    """
    return _OVERRIDES.sub(lambda match: ARGUMENTS[match[0]], message)


@contextmanager
def naming_arguments() -> Iterator[None]:
    """Name arguments in the errors of the block, or of the function that this decorates."""
    try:
        yield
    except UserError as error:
        error.args = (argument_names(str(error)),)
        raise
