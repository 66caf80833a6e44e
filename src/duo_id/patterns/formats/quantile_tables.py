"""Tables of KV heads that a loader cuts at a quantile: DuoAttention, LServe, RLKV and PruLong.

The first three share a rule (github.com/mit-han-lab/duo-attention, `sparsify_attention_heads`): scores are clipped to
[0, 1], each gets unseeded noise in [0, 1e-6), and heads at or above the interpolated `sparsity` quantile are retrieval
heads. (Nearly) equal gates then fall on either side by chance. Two properties of a table make the mask exact for any
noise:

- Scores differ by more than the noise. So tables are written as evenly spaced ranks of the pattern's heads.
- The quantile falls between two scores. Of N scores, the quantile s is at position s (N - 1) of the sorted ones, so k
  heads stream for every s between (k - 1) / (N - 1) and k / (N - 1), for example k / N.

PruLong's own loader (github.com/princeton-pli/PruLong, `round_masks_for_sparsity`) keeps the int(N (1 - s)) highest in
the model's precision, in which only 0 and 1 are sure to stay distinct: it gets masks.
"""

from pathlib import Path

import torch
from torch import Tensor

from duo_id.common.files import write_text
from duo_id.common.integrity import sealed
from duo_id.patterns.files import contents_of, duo_config
from duo_id.patterns.formats.options import Options, as_pattern
from duo_id.patterns.pattern import HeadPattern
from duo_id.patterns.saved import load_pattern
from duo_id.patterns.sources import CONFIG, HEADS, SCORES
from duo_id.patterns.tables import json_text, read_tsv, tsv

WEIGHTS = "adapter_weights.tsv"  # RLKV's table


def evenly_spaced_ranks(pattern: HeadPattern) -> Tensor:
    """The ranks of the pattern's heads as scores (layers, KV heads) in [0, 1), and 1 in layers without gates.

    They are 1 / (number of heads) apart.
    """
    gated = list(pattern.gated_layers)
    order = pattern.scores[gated].flatten().argsort(stable=True)
    ranks = torch.empty(len(order), dtype=torch.float64)
    ranks[order] = torch.arange(len(order), dtype=torch.float64) / pattern.scores.numel()
    table = torch.ones(pattern.scores.shape, dtype=torch.float64)
    table[gated] = ranks.view(len(gated), -1)
    return table.float()


def sparsity_to_pass(streaming: int, total: int, counted: bool = False) -> float:
    """A sparsity at which a loader streams exactly `streaming` of `total` heads: few digits, well inside the range.

    Args:
        streaming: heads that stream.
        total: heads in the table, including layers without gates.
        counted: must also work for loaders that keep int(total (1 - sparsity)) heads.
    """
    if streaming in (0, total):
        return float(streaming > 0)
    low, high = (streaming - 1) / (total - 1), streaming / (total if counted else total - 1)
    margin = (high - low) / 4
    rounded = (round((low + high) / 2, digits) for digits in range(1, 18))
    return next(value for value in rounded if low + margin <= value <= high - margin)


def streaming_heads(pattern: HeadPattern, sparsity: float) -> int:
    """The number of heads that stream under the mask of this sparsity."""
    return int((~pattern.binarize(sparsity=sparsity).retrieval).sum())


def read_folder(path: Path, options: Options) -> HeadPattern:
    """Read a folder of DuoAttention or LServe, or of RLKV, which needs the window as options."""
    if (path / WEIGHTS).is_file() and not (path / HEADS).is_file():
        return as_pattern(read_tsv(path / WEIGHTS), "rlkv", str(path / WEIGHTS), options)
    return load_pattern(path)


def read_table(path: Path, options: Options) -> HeadPattern:
    """Read a single table, such as PruLong's, of 0/1 or scores; it needs the window as options."""
    return as_pattern(read_tsv(path), "prulong", str(path), options)


def write_duo_attention(pattern: HeadPattern, path: Path, options: Options) -> str:
    """Write DuoAttention's folder; returns the sparsity for its loader."""
    _write_folder(pattern, path, SCORES)
    value, kept = _advice(pattern, options)
    loaded = f"load_attn_pattern({str(path)!r})"
    return f"{path}: heads, sink, recent = {loaded}; sparsify_attention_heads(heads, sparsity={value}): {kept}"


def write_lserve(pattern: HeadPattern, path: Path, options: Options) -> str:
    """Write LServe's folder, which is DuoAttention's; returns the arguments for its engine."""
    _write_folder(pattern, path, SCORES)
    windows = " ".join(
        f"--{phase}-sink-token {pattern.sink_size} --{phase}-local-token {pattern.recent_size}"
        for phase in ("ctx", "dec")
    )
    value, kept = _advice(pattern, options)
    return f"{path}: --static-sparse-attn-load-dir {path} --static-sparsity {value} {windows}: {kept}"


def write_rlkv(pattern: HeadPattern, path: Path, options: Options) -> str:
    """Write RLKV's folder; returns the arguments for its scripts."""
    _write_folder(pattern, path, WEIGHTS)
    windows = f"--sink_size {pattern.sink_size} --recent_size {pattern.recent_size}"
    value, kept = _advice(pattern, options)
    return f"{path}: --method rlkv --attn_load_dir {path} --sparsity {value} {windows}: {kept}"


def write_prulong(pattern: HeadPattern, path: Path, options: Options) -> str:
    """Write PruLong's table, a mask if a sparsity is given, else ranks; returns the arguments for its scripts."""
    windows = f"--duoattn_sink {pattern.sink_size} --duoattn_sliding {pattern.recent_size}"
    if options.sparsity is None:
        write_text(path, tsv(evenly_spaced_ranks(pattern)))
        value, kept = _advice(pattern, options)
        return f"{path}: --duoattn {path} --duoattn_sparsity {value} {windows}: {kept}"
    write_text(path, tsv(pattern.binarize(sparsity=options.sparsity).retrieval.int()))
    streaming, total = streaming_heads(pattern, options.sparsity), pattern.scores.numel()
    value = f"{sparsity_to_pass(streaming, total, counted=True):.10g}"
    return (
        f"{path}: --duoattn {path} --duoattn_sparsity {value} {windows}, or --load_masks_from {path} "
        f"--load_masks_sparsity {value}: {streaming} of {total} heads stream"
    )


def _write_folder(pattern: HeadPattern, folder: Path, table: str) -> None:
    """Write the table as ranks, and also heads.json, which `load_pattern` reads, so that nothing is lost."""
    files = {table: tsv(evenly_spaced_ranks(pattern))}
    if table == SCORES:
        files[CONFIG] = json_text(duo_config(pattern, files))
    files[HEADS] = json_text(sealed(contents_of(pattern)))
    for name, text in files.items():
        write_text(folder / name, text)


def _advice(pattern: HeadPattern, options: Options) -> tuple[str, str]:
    """The sparsity to pass, and how many heads stream with it."""
    total = pattern.scores.numel()
    if options.sparsity is None:
        return f"k/{total}", f"exactly k of {total} heads stream"
    streaming = streaming_heads(pattern, options.sparsity)
    return f"{sparsity_to_pass(streaming, total):.10g}", f"exactly {streaming} of {total} heads stream"
