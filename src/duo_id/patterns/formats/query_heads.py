"""Scores of query heads: the JSON of Retrieval_Head and HeadKV, and QRHead's JSON of scores and YAML of chosen heads.

`pool` turns them into scores of KV heads, `repeat_scores` back. Sources: github.com/nightdessert/Retrieval_Head (a
score is the mean of a list; top heads are by a stable sort, so of equal heads the first in the file),
github.com/FYYFU/HeadKV (the same, normalised by their sum, in the order of the file), github.com/princeton-pli/QRHead
(`attn_head_set`: heads from best to worst, or full_heads; detection writes pairs).
"""

import json
import re
from itertools import product
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from duo_id.common.documents import read_json, read_text
from duo_id.common.errors import UserError, one_line
from duo_id.common.files import write_text
from duo_id.patterns.formats.options import Options, as_pattern, pool, query_heads, repeat_scores
from duo_id.patterns.pattern import HeadPattern
from duo_id.patterns.tables import exact_rows

HEAD = re.compile(r"(\d{1,6})-(\d{1,6})", re.ASCII)  # layer and query head
LARGEST_YAML = 2**18  # bytes; a list of 10,000 heads takes half of it


def read_scores(path: Path, options: Options) -> HeadPattern:
    """Read JSON of Retrieval_Head or HeadKV, {"layer-head": [score, ...]}, or QRHead's [["layer-head", score], ...].

    Raises:
        UserError: it is neither, a head is missing, or the KV heads or the window are not given.
    """
    contents = read_json(path)
    pairs: Any = contents.items() if isinstance(contents, dict) else contents
    if not isinstance(contents, (dict, list)) or not all(_is_pair(pair) for pair in pairs):
        raise UserError(
            f'{path}: expected scores of query heads, {{"layer-head": [score, ...]}}, found {_kind(contents)}'
        )
    scores: dict[tuple[int, int], float] = {}
    for name, values in pairs:
        head, values = _parse_head(path, name), values if isinstance(values, list) else [values]
        if not values or any(isinstance(value, bool) or not isinstance(value, int | float) for value in values):
            raise UserError(f"{path}: head {name} has no score (its values: {values!s:.40})")
        scores[head] = sum(values) / len(values)
    if not scores:
        raise UserError(f"{path}: it has no scores")
    layers, heads = (max(indices) + 1 for indices in zip(*scores, strict=True))
    missing = next((head for head in product(range(layers), range(heads)) if head not in scores), None)
    if missing:
        raise UserError(
            f"{path}: of {layers} layers x {heads} query heads, head {missing[0]}-{missing[1]} has no score"
        )
    table = torch.tensor([[scores[layer, head] for head in range(heads)] for layer in range(layers)])
    return _pooled_pattern(table, "retrieval-head", path, options, {})


def read_head_list(path: Path, options: Options) -> HeadPattern:
    """Read QRHead's YAML: chosen heads get scores from 1 down by their rank in the list, all others 0.

    Raises:
        UserError: it is invalid, names heads that the model does not have, or the model's shape is not given.
    """
    try:
        contents = yaml.safe_load(read_text(path, LARGEST_YAML))
    except (yaml.YAMLError, RecursionError, ValueError) as error:  # ValueError: e.g. a date in year 0
        raise UserError(f"{path} is not YAML: {one_line(error, 120)}") from None
    chosen = contents.get("attn_head_set") if isinstance(contents, dict) else None
    if not isinstance(chosen, str):
        raise UserError(f'{path}: expected QRHead\'s attn_head_set: "layer-head,...", found {_kind(contents)}')
    reason = f"{path} does not contain the number of heads of the model"
    layers, heads = (options.require(key, reason) for key in ("layers", "heads"))
    table = torch.zeros(layers, heads)
    if chosen == "full_heads":
        table += 1
    else:
        listed_heads = [_parse_head(path, name) for name in chosen.split(",")]
        beyond = next((head for head in listed_heads if head[0] >= layers or head[1] >= heads), None)
        if beyond:
            raise UserError(f"{path}: head {beyond[0]}-{beyond[1]} is beyond {layers} layers x {heads} query heads")
        for rank, head in enumerate(listed_heads):
            table[head] = max(float(table[head]), 1 - rank / len(listed_heads))
    model = contents.get("model_name_or_path")
    return _pooled_pattern(table, "qrhead", path, options, {"id": model} if isinstance(model, str) else {})


def write_retrieval_head(pattern: HeadPattern, path: Path, options: Options) -> str:
    """Write Retrieval_Head's JSON, best first, so that its top heads are ours; returns instructions for use."""
    _write_scores(pattern.scores, pattern, path, options, best_first=True)
    return f"{path}: copy it to head_score/MODEL.json"


def write_headkv(pattern: HeadPattern, path: Path, options: Options) -> str:
    """Write HeadKV's JSON, negative scores as 0; returns instructions for use.

    Raises:
        UserError: no score is positive, so HeadKV would divide by zero.
    """
    scores = pattern.scores.clamp(min=0)
    if not scores.any():
        raise UserError("HeadKV divides its budget in proportion to the scores, but none of them is positive")
    _write_scores(scores, pattern, path, options)
    return f"{path}: copy it over Important_Head/head_score/MODEL_retrieval_heads.json"


def write_qrhead(pattern: HeadPattern, path: Path, options: Options) -> str:
    """Write QRHead's YAML with the query heads of the retrieval heads, best first; returns instructions for use.

    Raises:
        UserError: the sparsity is missing, or leaves no retrieval head.
    """
    if options.sparsity is None:
        raise UserError("format=qrhead holds chosen heads instead of scores: set sparsity=...")
    retrieval = pattern.binarize(sparsity=options.sparsity).retrieval
    heads = query_heads(pattern, options)
    if not retrieval.any():
        raise UserError(f"sparsity={options.sparsity} leaves no retrieval head, but QRHead cannot read an empty list")
    best = repeat_scores(pattern.scores.masked_fill(~retrieval, -torch.inf), heads).flatten()
    kept = int(repeat_scores(retrieval, heads).sum())
    order = _best_first(best)[:kept]
    model = (pattern.provenance.get("model") or {}).get("id")
    names = (
        {"model_base_class": model.rsplit("/", 1)[-1], "model_name_or_path": model} if isinstance(model, str) else {}
    )
    contents = {"attn_head_set": ",".join(f"{index // heads}-{index % heads}" for index in order)} | names
    write_text(path, yaml.safe_dump(contents, sort_keys=False, width=2**30))
    return f"{path}: QRRetriever(config_or_config_path={str(path)!r}); {kept} of {best.numel()} query heads"


def _write_scores(scores: Tensor, pattern: HeadPattern, path: Path, options: Options, best_first: bool = False) -> None:
    """One line, because readers take the first; layer by layer, which HeadKV relies on, or best first."""
    table = repeat_scores(scores, query_heads(pattern, options))
    rows, heads = exact_rows(table), table.shape[1]
    order = _best_first(table) if best_first else range(table.numel())
    heads_in_order = (divmod(index, heads) for index in order)
    write_text(path, json.dumps({f"{layer}-{head}": [rows[layer][head]] for layer, head in heads_in_order}) + "\n")


def _best_first(scores: Tensor) -> list[int]:
    """Flat indices of scores (layers, heads) in descending order; of equal scores the last first, as patterns order."""
    return [int(index) for index in scores.flatten().argsort(stable=True).flip(0)]


def _pooled_pattern(table: Tensor, name: str, path: Path, options: Options, model: dict[str, Any]) -> HeadPattern:
    heads = table.shape[1]
    if options.heads not in (None, heads):
        raise UserError(f"{path} has {heads} query heads per layer, not heads={options.heads}")
    kv_heads = options.require("kv_heads", f"{path} has {heads} query heads per layer, but no number of KV heads")
    return as_pattern(pool(table, kv_heads), name, str(path), options, {"heads": heads} | model)


def _parse_head(path: Path, name: str) -> tuple[int, int]:
    match = HEAD.fullmatch(name.strip())
    if match is None:
        raise UserError(f"{path}: expected a head as layer-head, such as 14-21, found {name[:40]!r}")
    return int(match[1]), int(match[2])


def _is_pair(pair: Any) -> bool:
    return isinstance(pair, (tuple, list)) and len(pair) == 2 and isinstance(pair[0], str)


def _kind(contents: Any) -> str:
    keys = (
        ", ".join(f"{' '.join(str(key).split()):.20}" for key in list(contents)[:3])
        if isinstance(contents, dict)
        else ""
    )
    return f"an object with {keys}" if keys else type(contents).__name__
