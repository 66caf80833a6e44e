"""Command lines that Hydra does not parse: typer reads their paths and KEY=VALUE, and `--help` shows examples."""

import inspect
import os
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import typer
from typer.core import TyperCommand
from typer.exceptions import TyperException

from duo_id.common.errors import UserError, naming_extras

Result = TypeVar("Result")
REQUIREMENTS = (  # what typer and pydantic say of a value, and what we say
    (r"Input should be less than or equal to (\S+)$", r" must be at most \1"),
    (r"Input should be greater than or equal to (\S+)$", r" must be at least \1"),
    (r"Input should be a valid integer.*", " must be a whole number"),
    (r"Input should be a valid number.*", " must be a number"),
    (r"'.*' is not one of (.*)$", r": choose one of \1"),
)
HELP_HINT = "; see --help for examples, and write a path that contains = as ./NAME"


class _Command(TyperCommand):
    """Shows options the way users type them here: KEY=VALUE, as in the Hydra commands."""

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """Put paths first, as in the examples."""
        options, *paths = super().collect_usage_pieces(ctx)
        return [*(re.sub("[{}]", "", path) for path in paths), options]

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Called by typer."""
        super().format_help(ctx, formatter)
        formatter.buffer[:] = [re.sub(r"--(\w+) (<.*>)$", r"\1=\2  ", text) for text in formatter.buffer]


def command(module: str, *examples: str) -> Callable[[Callable[..., Result]], Callable[[Sequence[str]], Result]]:
    """Turn a function whose parameters typer understands into one that takes a command line's arguments.

    An argument with a `=` is a path if it exists or if the part before the `=` is no identifier: `./a=b`.

    Args:
        module: the module behind the command, `duo_id.NAME`.
        examples: its arguments, for `--help`, which begins with the first line of the function's docstring.

    Raises:
        UserError: from the returned function: an argument is missing, unknown, given twice or out of range.
    """
    program = f"duo-id {module.rpartition('.')[2]}"

    def decorate(function: Callable[..., Result]) -> Callable[[Sequence[str]], Result]:
        summary = f"{inspect.getdoc(function)}".partition("\n")[0]
        help = "\n".join([summary, "", "\b", *(f"{program} {example}" for example in examples)])
        app = typer.Typer(add_completion=False, rich_markup_mode=None)
        app.command(cls=_Command, help=help, options_metavar="[KEY=VALUE ...]")(function)
        parser = typer.main.get_command(app)

        def main(arguments: Sequence[str]) -> Result:
            options = _as_options(arguments)
            try:
                with naming_extras(program), parser.make_context(program, [*options]) as context:
                    return parser.invoke(context)
            except typer.Exit as exit_request:
                sys.exit(exit_request.exit_code)
            except TyperException as error:
                raise UserError(_rephrase(error.format_message(), options)) from None

        return main

    return decorate


def _as_options(arguments: Sequence[str]) -> list[str]:
    """The command line in typer's syntax: KEY=VALUE becomes --KEY=VALUE, followed by the paths.

    Raises:
        UserError: an argument looks like an option, or a setting is given twice.
    """
    if {"-h", "--help"}.intersection(arguments):
        return ["--help"]
    settings: dict[str, str] = {}
    paths = []
    for argument in arguments:
        key, equals, _ = argument.partition("=")
        if os.path.exists(argument) or not (argument.startswith("-") or (equals and key.isidentifier())):
            paths.append(argument)
        elif argument.startswith("-"):
            raise UserError(f"{argument}: there are no options, give settings as KEY=VALUE{HELP_HINT}")
        elif key in settings:
            raise UserError(f"{argument}: {key} is given twice")
        else:
            settings[key] = f"--{argument}"
    return [*settings.values(), "--", *paths]


def _rephrase(message: str, options: Sequence[str]) -> str:
    """Typer's message in terms of KEY=VALUE; unless it is about a value, a hint at `--help` follows."""
    about_value = re.match(r"Invalid value for '--(\w+)': (?:Value error, )?(.*)", message.rstrip("."), re.DOTALL)
    if about_value is None:
        return re.sub(r"(^|[\s(])--(?=\w)", r"\1", message).rstrip(".") + HELP_HINT
    key, reason = about_value.groups()
    for pattern, words in REQUIREMENTS:
        if requirement := re.fullmatch(pattern, reason):
            value = next(option.partition("=")[2] for option in options if option.startswith(f"--{key}="))
            return f"{key}={value}{requirement.expand(words).replace(chr(39), '')}"
    return f"{key}: {reason}"
