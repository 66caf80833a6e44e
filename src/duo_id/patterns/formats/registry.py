"""The formats by name: how each is read, written and told apart, and what it cannot hold."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from duo_id.common.documents import read_json
from duo_id.common.errors import UserError
from duo_id.patterns.files import CONFIG, HEADS, SCORES, list_patterns, load_pattern, save_pattern
from duo_id.patterns.formats.kvzip import read_kvzip, write_kvzip
from duo_id.patterns.formats.options import Options
from duo_id.patterns.formats.quantile_tables import (
    WEIGHTS,
    read_folder,
    read_table,
    spaced,
    write_duo_attention,
    write_lserve,
    write_prulong,
    write_rlkv,
)
from duo_id.patterns.formats.query_heads import (
    read_chosen,
    read_scores,
    write_headkv,
    write_qrhead,
    write_retrieval_head,
)
from duo_id.patterns.pattern import HeadPattern


@dataclass(frozen=True)
class Format:
    """One format.

    Attributes:
        read: the pattern in a file or folder.
        write: a pattern into a file or folder; returns one line that says how the other tool takes it.
        folder: whether it is a folder and not a file.
        whole: whether heads.json stands beside, so that nothing is lost.
    """

    read: Callable[[Path, Options], HeadPattern]
    write: Callable[[HeadPattern, Path, Options], str]
    folder: bool = False
    whole: bool = False


def _write_own(pattern: HeadPattern, path: Path, options: Options) -> str:
    save_pattern(pattern, path, (0.25, 0.5, 0.75) if options.sparsity is None else (options.sparsity,))
    return f"{path}: duo_id.load_pattern({str(path)!r})"


FORMATS = {
    "heads": Format(read_folder, _write_own, folder=True, whole=True),  # ours
    "duo-attention": Format(read_folder, write_duo_attention, folder=True, whole=True),
    "lserve": Format(read_folder, write_lserve, folder=True, whole=True),
    "rlkv": Format(read_folder, write_rlkv, folder=True, whole=True),
    "prulong": Format(read_table, write_prulong),
    "retrieval-head": Format(read_scores, write_retrieval_head),
    "headkv": Format(read_scores, write_headkv),
    "qrhead": Format(read_chosen, write_qrhead),
    "kvzip": Format(read_kvzip, write_kvzip),
}


def read_any(source: str, options: Options) -> HeadPattern:
    """The pattern in a file or folder of any format, a shipped one, or one of the hub.

    Raises:
        UserError: no format is recognised, the file is broken, or an option is missing or contradicts it.
    """
    path = Path(source).expanduser()
    if source in list_patterns() or not path.exists():
        pattern = load_pattern(source)
    else:
        pattern = FORMATS[recognise(path)].read(path, options)
    said = dict(zip(("layers", "kv_heads"), pattern.scores.shape, strict=True))
    said |= {"sink_size": pattern.sink_size, "recent_size": pattern.recent_size}
    for key, value in said.items():
        if getattr(options, key) not in (None, value):
            raise UserError(f"{key}={getattr(options, key)} contradicts {source}, which has {value}")
    return pattern


def recognise(path: Path) -> str:
    """The name of the format that a file or folder has, of those that are read alike the first.

    Raises:
        UserError: it has none.
    """
    if path.is_dir():
        return "rlkv" if (path / WEIGHTS).is_file() else "heads"
    if path.suffix == ".tsv":
        return "heads" if path.name == SCORES and path.with_name(CONFIG).is_file() else "prulong"
    if path.suffix == ".json":
        contents = read_json(path)
        return "heads" if isinstance(contents, dict) and "schema" in contents else "retrieval-head"
    named = {".yaml": "qrhead", ".yml": "qrhead", ".pt": "kvzip"}
    if path.suffix not in named:
        raise UserError(
            f"{path} is of no known format: expected a folder with {HEADS}, {SCORES} or {WEIGHTS}, or a .json, .tsv, "
            ".yaml or .pt"
        )
    return named[path.suffix]


def lost_parts(pattern: HeadPattern, name: str, options: Options) -> list[str]:
    """What of a pattern the format `name` cannot hold, in words."""
    if FORMATS[name].whole:
        return []
    gone = ["provenance", f"windows (sink_size={pattern.sink_size}, recent_size={pattern.recent_size})"]
    if len(pattern.gated_layers) < len(pattern.scores):
        gone.append("which layers have gates")
    masked = name in ("prulong", "qrhead") and options.sparsity is not None
    if masked and not pattern.scores.equal(pattern.binarize(sparsity=options.sparsity).retrieval.float()):
        gone.append("scores (a mask stays)")
    if name == "prulong" and not masked and not pattern.scores.equal(spaced(pattern)):
        gone.append("scores (their order stays)")
    if name == "headkv" and (pattern.scores < 0).any():
        gone.append("negative scores (they become 0)")
    return gone
