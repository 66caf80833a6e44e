"""The one exception that the commands and notebooks show as a single line instead of a traceback, and such lines."""

from collections.abc import Iterator
from contextlib import contextmanager

EXTRAS = {
    "accelerate": "eval",
    "datasets": "eval",
    "filelock": "eval",
    "jinja2": "eval",
    "matplotlib": "eval",
    "pandas": "eval",
    "platformdirs": "eval",
    "pyarrow": "eval",
    "zstandard": "eval",
    "lightning": "train",
    "optuna": "sweep",
    "submitit": "sweep",
    "gguf": "demo",
    "wandb": "wandb",
    "tensorboard": "tensorboard",
    "lm_eval": "lm-eval",
    "flash_attn": "flash",
}  # an imported module -> the extra of pyproject.toml that installs it
NEEDS = {"train": "train", "identify": "train", "benchmark": "train"}  # these include the extra eval


class UserError(ValueError):
    """Something that the user can mend; the message is one line and names the override to change."""

    def _render_traceback_(self) -> list[str]:
        """What IPython shows in place of a traceback."""
        return [f"error: {self}"]


class MissingExtraError(UserError, ImportError):
    """A package of an extra is not installed."""


def check(condition: bool, message: str) -> None:
    """Raise a `UserError` with `message` unless `condition` holds."""
    if not condition:
        raise UserError(message)


@contextmanager
def naming_extras(feature: str = "") -> Iterator[None]:
    """Name the extra to install when the block, or the function that this decorates, misses a package of one.

    Args:
        feature: the command or public function that runs; if it needs more than the extra eval, its extra is named,
            whichever package is missed first.

    Raises:
        MissingExtraError: a package of an extra is not installed.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name not in EXTRAS:
            raise
        extra = EXTRAS[error.name]
        if extra == "eval":
            extra = NEEDS.get(feature, extra)
        message = f"{feature or 'this'} needs {error.name}, which is not installed: pip install 'duo_id[{extra}]'"
        raise MissingExtraError(message) from error


def one_line(error: object, most: int | None = 400) -> str:
    """All that an error or a library says, on one line of at most `most` characters, whatever a file put into it."""
    lines = (line.strip() for line in str(error).splitlines())
    text = printable(" ".join(filter(None, lines))) or type(error).__name__
    return text if most is None or len(text) <= most else f"{text[: most - 1]}…"


def first_line(error: object) -> str:
    """The first line of what a library says, where the rest is about its own code."""
    return one_line(next((line for line in str(error).splitlines() if line.strip()), type(error).__name__))


def printable(text: str) -> str:
    """A text without what could steer a terminal."""
    return "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in text)
