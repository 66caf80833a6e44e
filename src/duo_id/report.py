"""`python -m duo_id.report RUN_FOLDER ... [out=report.html]`: one HTML page about any evaluations and training runs."""

from collections.abc import Sequence
from pathlib import Path

from duo_id import app
from duo_id.errors import UserError
from duo_id.evaluation.page import report
from duo_id.evaluation.runs import read_run
from duo_id.files import write_text

PAGE = "report.html"
USAGE = f"python -m duo_id.report RUN_FOLDER ... [out={PAGE}]"


def main(arguments: Sequence[str]) -> Path:
    """Write the page about the runs that the command line names.

    Args:
        arguments: run folders, or the `results.json` in them, and perhaps `out=FILE`; without it the page goes to the
            first of the folders.

    Returns:
        the page's path.

    Raises:
        UserError: an argument is neither, or a run cannot be read.
    """
    given = [argument for argument in arguments if "=" not in argument or Path(argument).exists()]
    settings = dict(argument.split("=", 1) for argument in arguments if argument not in given)
    unknown = sorted(settings.keys() - {"out"})
    if unknown:
        raise UserError(f"{unknown[0]}={settings[unknown[0]]}: there is no such setting and no such folder; {USAGE}")
    if not given:
        raise UserError(f"give at least one run folder of evaluate or train: {USAGE}")
    first = Path(given[0])
    out = Path(settings.get("out") or (first if first.is_dir() else first.parent) / PAGE)
    if out.is_dir():
        raise UserError(f"out={out} is a folder: give a file, such as out={out / PAGE}")
    with app.console.status("reading") as status:
        page = report([read_run(path) for path in given], status.update)
    write_text(out, page)
    app.console.print(f"report: {out}", soft_wrap=True, highlight=False, markup=False)
    return out


if __name__ == "__main__":
    app.run_plain(main)
