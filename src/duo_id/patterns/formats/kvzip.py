"""KVzip's head scores: one tensor (layers, KV heads) in a .pt file (github.com/snu-mllab/KVzip, `load_head_score`)."""

from pathlib import Path

import torch
from torch import Tensor

from duo_id.common.documents import LARGEST
from duo_id.common.errors import UserError
from duo_id.common.files import atomic_path
from duo_id.patterns.fields import MOST_HEADS
from duo_id.patterns.formats.options import Options, as_pattern
from duo_id.patterns.formats.quantile_tables import streaming_heads
from duo_id.patterns.pattern import HeadPattern


def read_kvzip(path: Path, options: Options) -> HeadPattern:
    """Read KVzip's scores, without running code that a file may contain.

    Raises:
        UserError: the file does not hold exactly one such tensor, or the window is not given.
    """
    expected = f"{path}: expected KVzip's scores, one tensor (layers, KV heads)"
    if path.stat().st_size > LARGEST:
        raise UserError(f"{expected}, found {path.stat().st_size:,} bytes, more than any model needs ({LARGEST:,})")
    if path.exists() and not path.is_file():  # torch would block on a pipe
        raise UserError(f"{expected}, found {'a folder' if path.is_dir() else 'no file'}")
    try:
        scores = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # broken files raise errors of any kind
        raise UserError(f"{expected}, found a file that cannot be read ({type(error).__name__})") from None
    if not isinstance(scores, Tensor) or not scores.is_floating_point():
        raise UserError(f"{expected}, found {getattr(scores, 'dtype', type(scores).__name__)}")
    if scores.is_nested or scores.layout != torch.strided or scores.is_meta:
        kind = "nested" if scores.is_nested else "without values" if scores.is_meta else str(scores.layout)
        raise UserError(f"{expected}, found one that is {kind}")
    if scores.numel() > MOST_HEADS**2:  # a view of any shape can be stored in a few bytes
        raise UserError(f"{expected}, found one of shape {tuple(scores.shape)}")
    table = scores if scores.dim() == 2 else scores.squeeze()
    if table.dim() != 2:
        raise UserError(f"{expected}, found one of shape {tuple(scores.shape)}")
    return as_pattern(table, "kvzip", str(path), options)


def write_kvzip(pattern: HeadPattern, path: Path, options: Options) -> str:
    """Write KVzip's scores; returns the ratio for its scripts, which keep scores above a threshold, not at it."""
    try:
        with atomic_path(path) as temporary:
            torch.save(pattern.scores.clone(), temporary)
    except RuntimeError as error:  # torch's error for a full disk
        raise UserError(f"{path} cannot be written: make room there, or choose another DST") from error
    advice = f"{path}: copy it to utils/head_score/MODEL-DATA-0.pt, then --level head"
    if options.sparsity is None:
        return advice
    total = pattern.scores.numel()
    kept = total - streaming_heads(pattern, options.sparsity)
    ratio = 1.0 if kept == total else (kept + 0.5) / total
    return f"{advice} --ratio {ratio:.6g}: {kept} of {total} heads keep all tokens (equal scores stay together)"
