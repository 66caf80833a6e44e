"""`python -m duo_id.convert SRC DST format=NAME`: a head pattern into another tool's files, or out of them."""

from duo_id.common import stopping

if __name__ == "__main__":
    stopping.die_quietly()

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import fields
from pathlib import Path
from typing import Any

from duo_id.common import cli
from duo_id.common.documents import MOST_TOKENS
from duo_id.common.errors import UserError
from duo_id.common.folders import held
from duo_id.patterns.formats.options import Options
from duo_id.patterns.formats.registry import FORMATS, lost_parts, read_any

USAGE = "python -m duo_id.convert SRC DST [format=NAME] [sparsity=0.5] [lossy=true] [heads=, kv_heads=, ...]"
KEYS = ("format", "lossy", *(option.name for option in fields(Options)))


def main(arguments: Sequence[str]) -> Path:
    """Convert as the command line says, and print how the other tool takes the result.

    Args:
        arguments: SRC (a file or folder of any format, a shipped name, a hub repo), DST, and `key=value`: `format`
            (of DST; ours without it), `lossy=true` where DST cannot hold everything, and the fields of `Options`.

    Returns:
        DST.

    Raises:
        UserError: an argument is wrong, SRC cannot be read, or DST cannot hold it.
    """
    paths, settings = cli.sorted_out(arguments, USAGE)
    unknown = sorted(settings.keys() - set(KEYS))
    if unknown:
        given = f"{unknown[0]}={settings[unknown[0]]}"
        raise UserError(f"{given}: there is no such setting ({', '.join(KEYS)}); a path is ./{given}; {USAGE}")
    if len(paths) != 2:
        raise UserError(f"give SRC and DST, not {len(paths)} paths: {USAGE}")
    if "" in paths:
        raise UserError(f"'' is no path: {USAGE}")
    source, target = paths[0], Path(paths[1]).expanduser()
    name = settings.pop("format", "heads")
    if name not in FORMATS:
        raise UserError(f"format={name}: choose {', '.join(FORMATS)}")
    lossy = settings.pop("lossy", "false")
    if lossy not in ("true", "false"):
        raise UserError(f"lossy={lossy}: choose true or false")
    options = Options(**{key: _parsed(key, value) for key, value in settings.items()})
    same = target.resolve() == Path(source).expanduser().resolve()
    if target.exists() and (same or target.is_dir() != FORMATS[name].folder):
        kind = "folder" if FORMATS[name].folder else "file"
        raise UserError(f"{target} stands in the way: format={name} writes a {kind} of its own")
    pattern = read_any(source, options)
    gone = lost_parts(pattern, name, options)
    if gone and lossy == "false":
        raise UserError(f"format={name} cannot hold {', '.join(gone)}: give lossy=true to go without")
    advice = "wait until it ends, or give another DST"
    with held(target, advice, keep=False) if FORMATS[name].folder else nullcontext():
        note = FORMATS[name].write(pattern, target, options)
    if gone:
        cli.say(f"lost: {', '.join(gone)}")
    cli.say(note)
    return target


def _parsed(key: str, value: str) -> Any:
    if key == "model":
        return value
    try:
        number = float(value) if key == "sparsity" else int(value)
    except ValueError:
        raise UserError(f"{key}={value} is not a {'' if key == 'sparsity' else 'whole '}number") from None
    if (key == "sparsity" and not 0 <= number <= 1) or number < 0:
        raise UserError(f"{key}={value} must {'lie in [0, 1]' if key == 'sparsity' else 'not be negative'}")
    if number > MOST_TOKENS:
        raise UserError(f"{key}={value} must be at most {MOST_TOKENS}")
    return number


if __name__ == "__main__":
    cli.run_plain(main)
