"""The exception that commands and notebooks show as one line instead of a traceback, and helpers for such lines."""

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
    "torchao": "quantised",
    "vllm": "vllm",
}  # an imported module -> the extra of pyproject.toml that installs it
NEEDS = {"duo-id train": "train", "duo-id benchmark": "train", "identify": "train"}  # these include the extra eval


class UserError(ValueError):
    """A mistake that the user can correct; the message is one line and names the override to change."""

    def _render_traceback_(self) -> list[str]:
        """Called by IPython, which shows these lines in place of a traceback."""
        return [f"error: {self}"]


class MissingExtraError(UserError, ImportError):
    """A package of an extra is not installed."""


def check(condition: bool, message: str) -> None:
    """Raise a `UserError` with `message` unless `condition` holds."""
    if not condition:
        raise UserError(message)


@contextmanager
def naming_extras(feature: str) -> Iterator[None]:
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
        message = f"{feature} needs {error.name}, which is not installed: pip install 'duo_id[{extra}]'"
        raise MissingExtraError(message) from error


def one_line(error: object, limit: int | None = 400) -> str:
    """An error's whole message on one line of at most `limit` characters, without control characters."""
    lines = (line.strip() for line in str(error).splitlines())
    text = printable(" ".join(filter(None, lines))) or type(error).__name__
    return text if limit is None or len(text) <= limit else f"{text[: limit - 1]}…"


def first_line(error: object) -> str:
    """The first line of a library's message, whose other lines are about its own code."""
    return one_line(next((line for line in str(error).splitlines() if line.strip()), type(error).__name__))


def printable(text: str) -> str:
    """A text with all characters replaced that could control a terminal."""
    return "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in text)
