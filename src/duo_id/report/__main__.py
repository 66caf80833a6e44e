"""`python -m duo_id.report FOLDER ...`: one HTML page about evaluations, training runs and sweeps."""

from duo_id.common import stopping

if __name__ == "__main__":
    stopping.die_quietly()

from collections.abc import Sequence
from pathlib import Path

from duo_id.common import cli
from duo_id.common.errors import UserError
from duo_id.common.files import write_text
from duo_id.common.folders import check_link
from duo_id.report.page import report
from duo_id.report.runs import read_run
from duo_id.report.sweeps import Sweep, is_sweep, read_sweep, tables

PAGE = "report.html"
USAGE = f"python -m duo_id.report FOLDER ... [out={PAGE}] [reference=NAME]"


def main(arguments: Sequence[str]) -> Path:
    """Write the page about the runs that the command line names.

    Args:
        arguments: folders of runs and sweeps, or the `results.json` of a run, and perhaps `out=FILE`; without it the
            page goes to the first of the folders, and `reference=NAME`, the heads that others are compared with. The
            tables of sweeps are shown in the terminal too.

    Returns:
        the page's path.

    Raises:
        UserError: an argument is neither, a run cannot be read, no job of a sweep has come to its end, or the page in
            the first folder is a symbolic link out of it.
    """
    given, settings = cli.sorted_out(arguments, USAGE)
    unknown = sorted(settings.keys() - {"out", "reference"})
    if unknown:
        raise UserError(f"{unknown[0]}={settings[unknown[0]]}: there is no such setting and no such folder; {USAGE}")
    if not given:
        raise UserError(f"give at least one run folder of evaluate or train: {USAGE}")
    first = Path(given[0])
    folder = first if first.is_dir() else first.parent
    out = Path(settings.get("out") or folder / PAGE)
    if settings.get("out") == "":
        raise UserError(f"out= names no file: give a file, such as out={PAGE}")
    if out.is_dir():
        raise UserError(f"out={out} is a folder: give a file, such as out={out / PAGE}")
    if "out" not in settings:
        check_link(out, folder)
    with cli.console.status("reading") as status:
        sweeps = [_read_sweep(path) for path in given if is_sweep(path)]
        runs = [read_run(path) for path in given if not is_sweep(path)]
        page = report(runs, status.update, sweeps, settings.get("reference"))
    write_text(out, page)
    for table in [table for sweep in sweeps for table in tables(sweep).values()]:
        cli.console.print(table)
    cli.say(f"report: {out}")
    return out


def _read_sweep(path: str) -> Sweep:
    sweep = read_sweep(path)
    if not sweep.ended:
        first = sweep.jobs[0]
        raise UserError(
            f"{path}: none of the {len(sweep.jobs)} jobs has come to its end; job {first.name}: {first.error}"
        )
    return sweep


if __name__ == "__main__":
    cli.run_plain(main)
