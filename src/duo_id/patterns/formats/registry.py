"""The formats by name: how each is read, written and recognised, and what it cannot hold."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from duo_id.common.documents import read_json
from duo_id.common.errors import UserError
from duo_id.patterns.formats.kvzip import read_kvzip, write_kvzip
from duo_id.patterns.formats.options import Options
from duo_id.patterns.formats.permuted_checkpoint import write_permuted_checkpoint
from duo_id.patterns.formats.quantile_tables import (
    WEIGHTS,
    evenly_spaced_ranks,
    read_folder,
    read_table,
    write_duo_attention,
    write_lserve,
    write_prulong,
    write_rlkv,
)
from duo_id.patterns.formats.query_heads import (
    read_head_list,
    read_scores,
    write_headkv,
    write_qrhead,
    write_retrieval_head,
)
from duo_id.patterns.pattern import HeadPattern
from duo_id.patterns.saved import load_pattern, save_pattern
from duo_id.patterns.sources import CONFIG, HEADS, SCORES, SPANS, list_patterns


@dataclass(frozen=True)
class Format:
    """One format.

    Attributes:
        read: reads the pattern in a file or folder.
        write: writes a pattern to a file or folder; returns one line on how to use it with the other tool.
        folder: whether it is a folder, not a file.
        lossless: whether it includes a heads.json, so that nothing is lost.
    """

    read: Callable[[Path, Options], HeadPattern]
    write: Callable[[HeadPattern, Path, Options], str]
    folder: bool = False
    lossless: bool = False


def _write_heads(pattern: HeadPattern, path: Path, options: Options) -> str:
    spans = None
    if options.cache is not None and options.length is not None:
        spans = pattern.allocate(options.cache, options.length)  # refused before anything is written
    save_pattern(pattern, path, (0.25, 0.5, 0.75) if options.sparsity is None else (options.sparsity,))
    usage = f"{path}: duo_id.load_pattern({str(path)!r})"
    if spans is None:
        return usage
    spans.save(path / SPANS)
    return f"{usage}, duo_id.HeadSpans.from_pretrained({str(path / SPANS)!r})"


FORMATS = {
    "heads": Format(read_folder, _write_heads, folder=True, lossless=True),  # ours
    "duo-attention": Format(read_folder, write_duo_attention, folder=True, lossless=True),
    "lserve": Format(read_folder, write_lserve, folder=True, lossless=True),
    "rlkv": Format(read_folder, write_rlkv, folder=True, lossless=True),
    "prulong": Format(read_table, write_prulong),
    "retrieval-head": Format(read_scores, write_retrieval_head),
    "headkv": Format(read_scores, write_headkv),
    "qrhead": Format(read_head_list, write_qrhead),
    "kvzip": Format(read_kvzip, write_kvzip),
    "permuted-checkpoint": Format(read_folder, write_permuted_checkpoint, folder=True, lossless=True),  # with heads/
}


def read_any(source: str, options: Options) -> HeadPattern:
    """Read a pattern from a file or folder of any format, a shipped name, or the hub.

    Raises:
        UserError: the format is not recognised, the file is broken, or an option is missing or contradicts the file.
    """
    path = Path(source).expanduser()
    if source in list_patterns() or not path.exists():
        pattern = load_pattern(source)
    else:
        pattern = FORMATS[recognise(path)].read(path, options)
    values = dict(zip(("layers", "kv_heads"), pattern.scores.shape, strict=True))
    values |= {"sink_size": pattern.sink_size, "recent_size": pattern.recent_size}
    for key, value in values.items():
        if getattr(options, key) not in (None, value):
            raise UserError(f"{key}={getattr(options, key)} contradicts {source}, which has {value}")
    return pattern


def recognise(path: Path) -> str:
    """The name of the format of a file or folder; the first one, among formats that are read in the same way.

    Raises:
        UserError: the format is unknown.
    """
    if path.is_dir():
        return "rlkv" if (path / WEIGHTS).is_file() else "heads"
    if path.suffix == ".tsv":
        return "heads" if path.name == SCORES and path.with_name(CONFIG).is_file() else "prulong"
    if path.suffix == ".json":
        contents = read_json(path)
        return "heads" if isinstance(contents, dict) and "schema" in contents else "retrieval-head"
    by_suffix = {".yaml": "qrhead", ".yml": "qrhead", ".pt": "kvzip"}
    if path.suffix not in by_suffix:
        raise UserError(
            f"{path} has no known format: expected a folder with {HEADS}, {SCORES} or {WEIGHTS}, or a .json, .tsv, "
            ".yaml or .pt"
        )
    return by_suffix[path.suffix]


def lost_parts(pattern: HeadPattern, name: str, options: Options) -> list[str]:
    """The parts of a pattern that the format `name` cannot hold, in words."""
    if FORMATS[name].lossless:
        return []
    needs = [] if pattern.needs is None else ["needs"]
    lost = [*needs, "provenance", f"windows (sink_size={pattern.sink_size}, recent_size={pattern.recent_size})"]
    if len(pattern.gated_layers) < len(pattern.scores):
        lost.append("which layers have gates")
    masked = name in ("prulong", "qrhead") and options.sparsity is not None
    if masked and not pattern.scores.equal(pattern.binarize(sparsity=options.sparsity).retrieval.float()):
        lost.append("scores (a mask remains)")
    if name == "prulong" and not masked and not pattern.scores.equal(evenly_spaced_ranks(pattern)):
        lost.append("scores (their order remains)")
    if name == "headkv" and (pattern.scores < 0).any():
        lost.append("negative scores (they become 0)")
    return lost
