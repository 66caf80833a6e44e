"""`python -m duo_id.convert SRC DST format=NAME`: convert a head pattern to or from another tool's files.

Modules that need torch are imported late, so that `--help` and mistakes are answered at once.
"""

from duo_id.common import stopping

if __name__ == "__main__":
    stopping.die_quietly()

from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Literal

from typer import Argument, Option

from duo_id.common import cli
from duo_id.common.arguments import command
from duo_id.common.documents import MOST_TOKENS
from duo_id.common.errors import UserError, check
from duo_id.common.folders import lock_folder

Format = Literal[
    "heads",
    "duo-attention",
    "lserve",
    "rlkv",
    "prulong",
    "retrieval-head",
    "headkv",
    "qrhead",
    "kvzip",
    "permuted-checkpoint",
]  # the keys of FORMATS; tests/test_convert.py keeps them in sync
SIZE_RANGE = {"min": 0, "max": MOST_TOKENS}


@command(
    "duo_id.convert",
    "outputs/train/DATE/TIME DIR format=duo-attention sparsity=0.5",
    "SmolLM2-135M-Instruct heads.json format=retrieval-head lossy=true",
    "outputs/train/DATE/TIME DIR format=duo-attention cache=0.25 length=32768 lossy=true",
    "head_score/MODEL.json DIR kv_heads=8 sink_size=128 recent_size=256",
    "outputs/train/DATE/TIME DIR format=permuted-checkpoint checkpoint=MODEL sparsity=0.5",
)
def main(
    source: Annotated[str, Argument(metavar="SRC", help="file or folder of any format, shipped name or hub repo")],
    target: Annotated[str, Argument(metavar="DST", help="file or folder to write")],
    format: Annotated[Format, Option(help="of DST")] = "heads",
    lossy: Annotated[Literal["true", "false"], Option(help="drop what DST cannot hold")] = "false",
    sparsity: Annotated[float | None, Option(min=0, max=1, help="if a file holds a mask instead of scores")] = None,
    cache: Annotated[
        float | None, Option(min=0, max=1, help="in place of a sparsity: share of the full cache's bytes to keep")
    ] = None,
    length: Annotated[int | None, Option(**SIZE_RANGE, help="tokens of the context of which cache is a share")] = None,
    layers: Annotated[int | None, Option(**SIZE_RANGE, help="of the model")] = None,
    heads: Annotated[int | None, Option(**SIZE_RANGE, help="query heads of a layer")] = None,
    kv_heads: Annotated[int | None, Option("--kv_heads", **SIZE_RANGE, help="KV heads of a layer")] = None,
    sink_size: Annotated[
        int | None, Option("--sink_size", **SIZE_RANGE, help="first tokens that streaming heads see")
    ] = None,
    recent_size: Annotated[
        int | None, Option("--recent_size", **SIZE_RANGE, help="latest tokens that they see")
    ] = None,
    checkpoint: Annotated[str | None, Option(help="folder of the weights whose heads are sorted")] = None,
    model: Annotated[str | None, Option(help="hub id of the model, recorded as the pattern's provenance")] = None,
) -> Path:
    """Convert a head pattern to or from another tool's files.

    Prints how to use the result in the other tool.

    Returns:
        DST.

    Raises:
        UserError: SRC cannot be read, or DST cannot hold it.
    """
    from duo_id.patterns.formats.options import Options
    from duo_id.patterns.formats.registry import FORMATS, lost_parts, read_any
    from duo_id.patterns.formats.two_values import as_two_values

    check("" not in (source, target), "SRC and DST must not be empty")
    path = Path(target).expanduser()
    options = Options(sparsity, layers, heads, kv_heads, sink_size, recent_size, model, cache, length, checkpoint)
    same = path.resolve() == Path(source).expanduser().resolve()
    if path.exists() and (same or path.is_dir() != FORMATS[format].folder):
        kind = "folder" if FORMATS[format].folder else "file"
        raise UserError(f"{path} is in the way: format={format} writes a new {kind}, give another DST")
    pattern, lost = read_any(source, options), list[str]()
    check(cache is None or format != "headkv", "format=headkv shares its budget out by the scores: leave out cache")
    if cache is not None and format != "heads":
        pattern, options, lost = as_two_values(pattern, options)
    lost += lost_parts(pattern, format, options)
    check(not lost or lossy == "true", f"format={format} cannot hold {', '.join(lost)}: give lossy=true to drop it")
    advice = "wait until it ends, or give another DST"
    with lock_folder(path, advice, keep=False) if FORMATS[format].folder else nullcontext():
        usage = FORMATS[format].write(pattern, path, options)
    if lost:
        cli.say(f"lost: {', '.join(lost)}")
    cli.say(usage)
    return path


if __name__ == "__main__":
    cli.run_plain(main)
