"""`python -m duo_id.peers RUN`: token eviction on the questions of an evaluation, for comparison with head patterns.

kvpress has an environment of its own, since it needs an older transformers than duo_id; this command checks what is
asked for and hands over to the Python there.
"""

from duo_id.common import stopping

if __name__ == "__main__":
    stopping.die_quietly()

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Literal

from typer import Argument, Option

from duo_id.common import cli
from duo_id.common.arguments import command
from duo_id.common.config import shown
from duo_id.common.errors import UserError, check
from duo_id.peers.answers import SAMPLES
from duo_id.peers.choices import GROUPS, PRESSES, chosen
from duo_id.peers.environment import install as install_environment
from duo_id.peers.environment import python_of

WORKER = Path(__file__).with_name("worker.py")
Flag = Literal["true", "false"]


@command(
    "duo_id.peers",
    "outputs/evaluate/DATE/TIME install=true",
    "outputs/evaluate/DATE/TIME presses=newest,snapkv sparsity=0.5 samples=2",
    "outputs/evaluate/DATE/TIME heads=true",
)
def main(
    run: Annotated[str, Argument(metavar="RUN", help="a run of duo_id.evaluate with peers=true")],
    presses: Annotated[str, Option(help=f"{', '.join(PRESSES)}; or a group: {', '.join(GROUPS)}")] = "usual",
    sparsity: Annotated[str | None, Option(help="some of the run's, such as 0.25,0.5; without it all")] = None,
    cache: Annotated[str | None, Option(help="some of the run's shares of the cache, likewise")] = None,
    tasks: Annotated[str | None, Option(help="some of the run's; without it all")] = None,
    samples: Annotated[int | None, Option(min=1, help="the first of each task; without it all")] = None,
    generate: Annotated[Flag | None, Option(help="generate answers; without it as the run does")] = None,
    device: Annotated[str | None, Option(help="such as cpu; without it a GPU if there is one")] = None,
    heads: Annotated[Flag, Option(help="write kvpress's static heads as a head pattern, and no answers")] = "false",
    environment: Annotated[str, Option(help="folder of the virtual environment with kvpress")] = ".venv-peers",
    install: Annotated[Flag, Option(help="create that environment first, if it does not exist")] = "false",
) -> None:
    """Answer the questions of an evaluation under kvpress's token eviction, for comparison at equal bytes.

    Raises:
        UserError: an option is not valid, or there is no environment with kvpress.
    """
    names = chosen(presses)
    check((Path(run) / SAMPLES).is_file(), f"{run} holds no {SAMPLES}: python -m duo_id.evaluate peers=true writes it")
    options = {
        "folder": run,
        "presses": names,
        "heads": heads == "true",
        "sparsity": None if sparsity is None else _numbers("sparsity", sparsity),
        "cache": None if cache is None else _numbers("cache", cache),
        "samples": samples,
        "tasks": None if tasks is None else tasks.split(","),
        "generate": None if generate is None else generate == "true",
        "device": device,
    }
    folder = Path(environment)
    if install == "true":
        install_environment(folder, cli.say)
    python = str(python_of(folder))
    sys.stdout.flush()
    others = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    os.execve(python, [python, "-P", str(WORKER), json.dumps(options)], others)


def _numbers(key: str, text: str) -> list[float]:
    try:
        return [float(number) for number in text.strip("[]").split(",")]
    except ValueError:
        raise UserError(f"{key}={shown(text)}: give numbers, such as {key}=0.25,0.5") from None


if __name__ == "__main__":
    cli.run_plain(main)
