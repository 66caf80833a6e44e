"""Commands that are not Hydra's: typer reads their paths and KEY=VALUE, and `--help` has their examples."""

import inspect
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import typer
from typer.core import TyperCommand
from typer.exceptions import TyperException

from duo_id.common.errors import UserError

Made = TypeVar("Made")
HINT = "; --help has examples, and a path with a = in it is ./NAME"


class _Command(TyperCommand):
    """Shows options as they are typed here, KEY=VALUE as in the commands of Hydra."""

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """Paths first, as in the examples."""
        options, *paths = super().collect_usage_pieces(ctx)
        return [*(re.sub("[{}]", "", path) for path in paths), options]

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Called by typer."""
        super().format_help(ctx, formatter)
        formatter.buffer[:] = [re.sub(r"--(\w+) (<.*>)$", r"\1=\2  ", text) for text in formatter.buffer]


def command(module: str, *examples: str) -> Callable[[Callable[..., Made]], Callable[[Sequence[str]], Made]]:
    """Make a function whose parameters typer understands one that takes the arguments of a command line.

    A path may have a `=` too, where it is there or what stands before the `=` is no name: `./a=b`.

    Args:
        module: what is run by `python -m`.
        examples: its arguments, for `--help`, which begins with the first line of the function's docstring.

    Raises:
        UserError: by what is returned: an argument is missing, unknown, given twice or out of range.
    """
    program = f"python -m {module}"

    def made(function: Callable[..., Made]) -> Callable[[Sequence[str]], Made]:
        about = f"{inspect.getdoc(function)}".partition("\n")[0]
        help = "\n".join([about, "", "\b", *(f"{program} {example}" for example in examples)])
        app = typer.Typer(add_completion=False, rich_markup_mode=None)
        app.command(cls=_Command, help=help, options_metavar="[KEY=VALUE ...]")(function)
        parser = typer.main.get_command(app)

        def main(arguments: Sequence[str]) -> Made:
            try:
                with parser.make_context(program, _as_options(arguments)) as context:
                    return parser.invoke(context)
            except typer.Exit as end:
                sys.exit(end.exit_code)
            except TyperException as error:
                raise UserError(_in_our_words(error.format_message())) from None

        return main

    return made


def _as_options(arguments: Sequence[str]) -> list[str]:
    """A command line with KEY=VALUE as typer has it, --KEY=VALUE, before the paths.

    Raises:
        UserError: an argument looks like an option, and there are none, or a setting is given twice.
    """
    if {"-h", "--help"}.intersection(arguments):
        return ["--help"]
    settings: dict[str, str] = {}
    paths = []
    for argument in arguments:
        key, equals, _ = argument.partition("=")
        if Path(argument).exists() or not (argument.startswith("-") or (equals and key.isidentifier())):
            paths.append(argument)
        elif argument.startswith("-"):
            raise UserError(f"{argument}: there are no options, settings are KEY=VALUE{HINT}")
        elif key in settings:
            raise UserError(f"{argument}: {key} is given twice")
        else:
            settings[key] = f"--{argument}"
    return [*settings.values(), "--", *paths]


def _in_our_words(message: str) -> str:
    """What typer says of a value, after its name; of the rest, how the command is used."""
    message, count = re.subn(r"^Invalid value for '--(\w+)': (Value error, )?", r"\1: ", message)
    return message.rstrip(".") if count else re.sub(r"(^|[\s(])--(?=\w)", r"\1", message).rstrip(".") + HINT
