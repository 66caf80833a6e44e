"""Where head patterns are found: by shipped name, file, folder, run or repo of the hub; without importing torch."""

from errno import ENAMETOOLONG
from os import lstat
from os.path import lexists
from pathlib import Path

from duo_id.common.errors import UserError
from duo_id.patterns import hub

SHIPPED = Path(__file__).parent / "head_patterns"
HEADS, SCORES, CONFIG = "heads.json", "full_attention_heads.tsv", "config.json"
SPANS = "spans.json"  # where a pattern was written with spans of one length


def local_file(source: str | Path) -> Path | None:
    """The file that holds a pattern; None for a repo of the hub.

    Args:
        source: see `duo_id.patterns.files.read_heads`.

    Raises:
        UserError: there is no pattern of that name, or the path holds none.
    """
    if str(source) in list_patterns():
        return SHIPPED / source / HEADS
    if not isinstance(source, str | Path) or not str(source):
        raise UserError(f"{source!r:.80} is not the name, path or repo of a head pattern")
    path = Path(source).expanduser()
    try:
        lstat(path)
    except OSError as error:
        if error.errno == ENAMETOOLONG:  # which pathlib raises
            raise UserError(f"{str(source)!r:.80} is no head pattern: {error.strerror}") from error
    if path.is_dir():
        file = file_in(path)
        if file is None:
            raise UserError(
                f"{path} has no heads/ yet (nor {HEADS} or {SCORES}): a run writes its heads when it finishes"
            )
        path = file
    elif not path.exists():
        if repo_of(source) is not None:
            return None
        shipped = ", ".join(list_patterns()) or "none"
        raise UserError(f"no head pattern {str(source)!r}: not a file, a folder or a shipped name ({shipped})")
    if path.suffix not in (".json", ".tsv"):
        raise UserError(f"{path} is not a head pattern: pass a folder, a {HEADS} or a {SCORES}")
    return path


def file_in(folder: Path) -> Path | None:
    """The file in a folder that holds its pattern; `heads.json` takes precedence."""
    candidates = (folder / HEADS, folder / SCORES, folder / "heads" / HEADS, folder / "heads" / SCORES)
    return next((candidate for candidate in candidates if lexists(candidate)), None)


def list_patterns() -> list[str]:
    """The names of the patterns that come with the package, sorted."""
    return sorted(path.parent.name for path in SHIPPED.glob(f"*/{HEADS}"))


def pattern_name(source: str | Path) -> str:
    """A short name for the pattern at `source`: the shipped name, the repo, or the end of the path."""
    if str(source) in list_patterns() or repo_of(source):
        return str(source)
    parts = [part for part in Path(source).expanduser().resolve().parts if part not in ("/", "heads", HEADS, SCORES)]
    return "/".join(parts[-2:])


def repo_of(source: str | Path) -> tuple[str, str | None] | None:
    """Repo and revision that `source` names, unless it is a local path."""
    return None if Path(source).expanduser().exists() else hub.split_revision(str(source))
