"""`python -m duo_id.report FOLDER ...`: one HTML page about evaluations, training runs and sweeps.

What needs torch and pandas is imported where the work begins: `--help` and mistakes are answered at once.
"""

from duo_id.common import stopping

if __name__ == "__main__":
    stopping.die_quietly()

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Argument, Option

from duo_id.common import cli
from duo_id.common.arguments import command
from duo_id.common.errors import UserError, check
from duo_id.common.files import write_text
from duo_id.common.folders import check_link

if TYPE_CHECKING:
    from duo_id.report.sweeps import Sweep

PAGE = "report.html"


@command(
    "duo_id.report",
    "outputs/evaluate/DATE/TIME outputs/train/DATE/TIME out=report.html",
    "outputs/evaluate/DATE/TIME reference=saliency",
    "outputs/sweeps/DATE/TIME",
)
def main(
    folders: Annotated[list[str], Argument(metavar="FOLDER", help="runs and sweeps, or the results.json of a run")],
    out: Annotated[str | None, Option(help=f"the page; {PAGE} in the first folder without it")] = None,
    reference: Annotated[str | None, Option(help="the heads that others are compared with")] = None,
) -> Path:
    """Write one HTML page about evaluations, training runs and sweeps.

    The tables of sweeps are shown in the terminal too.

    Returns:
        the page's path.

    Raises:
        UserError: a run cannot be read, no job of a sweep has come to its end, or the page in the first folder is a
            symbolic link out of it.
    """
    for path in folders:
        check(Path(path).exists(), f"{path} is missing: give run folders of evaluate or train")
    first = Path(folders[0])
    folder = first if first.is_dir() else first.parent
    check(out != "", f"out= names no file: give a file, such as out={PAGE}")
    page = folder / PAGE if out is None else Path(out)
    check(not page.is_dir(), f"out={page} is a folder: give a file, such as out={page / PAGE}")
    if out is None:
        check_link(page, folder)
    from duo_id.report.page import report
    from duo_id.report.runs import read_run
    from duo_id.report.sweeps import is_sweep, tables

    with cli.console.status("reading") as status:
        sweeps = [_read_sweep(path) for path in folders if is_sweep(path)]
        runs = [read_run(path) for path in folders if not is_sweep(path)]
        html = report(runs, status.update, sweeps, reference)
    write_text(page, html)
    for table in [table for sweep in sweeps for table in tables(sweep).values()]:
        cli.console.print(table)
    cli.say(f"report: {page}")
    return page


def _read_sweep(path: str) -> "Sweep":
    from duo_id.report.sweeps import read_sweep

    sweep = read_sweep(path)
    if not sweep.ended:
        first = sweep.jobs[0]
        raise UserError(
            f"{path}: none of the {len(sweep.jobs)} jobs has come to its end; job {first.name}: {first.error}"
        )
    return sweep


if __name__ == "__main__":
    cli.run_plain(main)
