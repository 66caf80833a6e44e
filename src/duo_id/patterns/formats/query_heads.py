"""Scores of query heads: the JSON of Retrieval_Head and HeadKV, and QRHead's, its YAML of the chosen heads.

`pool` makes them scores of KV heads, `spread` gives them back. Sources: github.com/nightdessert/Retrieval_Head (a score
is the mean of a list; its top heads are those of a stable sort, so of equal heads those that stand first in the file),
github.com/FYYFU/HeadKV (the same, normalised by their sum, in the order of the file), github.com/princeton-pli/QRHead
(`attn_head_set`: heads from the best down, or full_heads; detection writes pairs).
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
from duo_id.patterns.formats.options import Options, as_pattern, pool, query_heads, spread
from duo_id.patterns.pattern import HeadPattern
from duo_id.patterns.tables import exact_rows

HEAD = re.compile(r"(\d{1,6})-(\d{1,6})", re.ASCII)  # layer and query head
LARGEST_YAML = 2**18  # bytes: the list of all of 10,000 heads has half of it


def read_scores(path: Path, options: Options) -> HeadPattern:
    """A JSON of Retrieval_Head or HeadKV, {"layer-head": [score, ...]}, or QRHead's [["layer-head", score], ...].

    Raises:
        UserError: it is neither, a head is missing, or the KV heads or windows are not given.
    """
    contents = read_json(path)
    pairs: Any = contents.items() if isinstance(contents, dict) else contents
    if not isinstance(contents, (dict, list)) or not all(_is_pair(pair) for pair in pairs):
        raise UserError(
            f'{path}: expected scores of query heads, {{"layer-head": [score, ...]}}, found {_kind(contents)}'
        )
    scores: dict[tuple[int, int], float] = {}
    for name, values in pairs:
        place, values = _place(path, name), values if isinstance(values, list) else [values]
        if not values or any(isinstance(value, bool) or not isinstance(value, int | float) for value in values):
            raise UserError(f"{path}: head {name} has no score (its values: {values!s:.40})")
        scores[place] = sum(values) / len(values)
    if not scores:
        raise UserError(f"{path}: no head is scored")
    layers, heads = (max(places) + 1 for places in zip(*scores, strict=True))
    missing = next((place for place in product(range(layers), range(heads)) if place not in scores), None)
    if missing:
        raise UserError(
            f"{path}: of {layers} layers x {heads} query heads, head {missing[0]}-{missing[1]} has no score"
        )
    table = torch.tensor([[scores[layer, head] for head in range(heads)] for layer in range(layers)])
    return _pooled(table, "retrieval-head", path, options, {})


def read_chosen(path: Path, options: Options) -> HeadPattern:
    """QRHead's YAML: the chosen heads score from 1 down by their place in the list, all others 0.

    Raises:
        UserError: it is none, names heads that the model does not have, or the model's shape is not given.
    """
    try:
        contents = yaml.safe_load(read_text(path, LARGEST_YAML))
    except (yaml.YAMLError, RecursionError, ValueError) as error:  # such as of a date in the year 0
        raise UserError(f"{path} is not YAML: {one_line(error, 120)}") from None
    chosen = contents.get("attn_head_set") if isinstance(contents, dict) else None
    if not isinstance(chosen, str):
        raise UserError(f'{path}: expected QRHead\'s attn_head_set: "layer-head,...", found {_kind(contents)}')
    what = f"{path} does not say how many heads the model has"
    layers, heads = (options.need(key, what) for key in ("layers", "heads"))
    table = torch.zeros(layers, heads)
    if chosen == "full_heads":
        table += 1
    else:
        places = [_place(path, name) for name in chosen.split(",")]
        beyond = next((place for place in places if place[0] >= layers or place[1] >= heads), None)
        if beyond:
            raise UserError(f"{path}: head {beyond[0]}-{beyond[1]} is beyond {layers} layers x {heads} query heads")
        for rank, place in enumerate(places):
            table[place] = max(float(table[place]), 1 - rank / len(places))
    model = contents.get("model_name_or_path")
    return _pooled(table, "qrhead", path, options, {"id": model} if isinstance(model, str) else {})


def write_retrieval_head(pattern: HeadPattern, path: Path, options: Options) -> str:
    """Write Retrieval_Head's JSON, best first, so that its top heads are ours; returns what to do with it."""
    _write_scores(pattern.scores, pattern, path, options, best_first=True)
    return f"{path}: copy it to head_score/MODEL.json"


def write_headkv(pattern: HeadPattern, path: Path, options: Options) -> str:
    """Write HeadKV's JSON, negative scores as 0; returns what to do with it.

    Raises:
        UserError: no score is positive, and HeadKV would divide by their sum.
    """
    scores = pattern.scores.clamp(min=0)
    if not scores.any():
        raise UserError("HeadKV shares its budget in proportion to the scores, and none is positive: nothing to share")
    _write_scores(scores, pattern, path, options)
    return f"{path}: copy it over Important_Head/head_score/MODEL_retrieval_heads.json"


def write_qrhead(pattern: HeadPattern, path: Path, options: Options) -> str:
    """Write QRHead's YAML with the query heads of the retrieval heads, best first; returns what to do with it.

    Raises:
        UserError: there is no sparsity, or no retrieval head is left.
    """
    if options.sparsity is None:
        raise UserError("format=qrhead names the chosen heads and no scores: give sparsity=...")
    retrieval = pattern.binarize(sparsity=options.sparsity).retrieval
    heads = query_heads(pattern, options)
    if not retrieval.any():
        raise UserError(f"sparsity={options.sparsity} leaves no retrieval head, and QRHead cannot read an empty list")
    best = spread(pattern.scores.masked_fill(~retrieval, -torch.inf), heads).flatten()
    kept = int(spread(retrieval, heads).sum())
    order = _best_first(best)[:kept]
    model = (pattern.provenance.get("model") or {}).get("id")
    names = (
        {"model_base_class": model.rsplit("/", 1)[-1], "model_name_or_path": model} if isinstance(model, str) else {}
    )
    contents = {"attn_head_set": ",".join(f"{place // heads}-{place % heads}" for place in order)} | names
    write_text(path, yaml.safe_dump(contents, sort_keys=False, width=2**30))
    return f"{path}: QRRetriever(config_or_config_path={str(path)!r}); {kept} of {best.numel()} query heads"


def _write_scores(scores: Tensor, pattern: HeadPattern, path: Path, options: Options, best_first: bool = False) -> None:
    """One line, for the readers take the first; layer by layer, which HeadKV relies on, or best first."""
    table = spread(scores, query_heads(pattern, options))
    rows, heads = exact_rows(table), table.shape[1]
    order = _best_first(table) if best_first else range(table.numel())
    places = (divmod(place, heads) for place in order)
    write_text(path, json.dumps({f"{layer}-{head}": [rows[layer][head]] for layer, head in places}) + "\n")


def _best_first(scores: Tensor) -> list[int]:
    """The places of scores (layers, heads) from the end of the order of patterns: of equal ones the last first."""
    return [int(place) for place in scores.flatten().argsort(stable=True).flip(0)]


def _pooled(table: Tensor, name: str, path: Path, options: Options, model: dict[str, Any]) -> HeadPattern:
    heads = table.shape[1]
    if options.heads not in (None, heads):
        raise UserError(f"{path} has {heads} query heads a layer, not heads={options.heads}")
    kv_heads = options.need("kv_heads", f"{path} scores {heads} query heads a layer and does not say how many KV heads")
    return as_pattern(pool(table, kv_heads), name, str(path), options, {"heads": heads} | model)


def _place(path: Path, name: str) -> tuple[int, int]:
    found = HEAD.fullmatch(name.strip())
    if found is None:
        raise UserError(f"{path}: expected a head as layer-head, such as 14-21, found {name[:40]!r}")
    return int(found[1]), int(found[2])


def _is_pair(pair: Any) -> bool:
    return isinstance(pair, (tuple, list)) and len(pair) == 2 and isinstance(pair[0], str)


def _kind(contents: Any) -> str:
    keys = (
        ", ".join(f"{' '.join(str(key).split()):.20}" for key in list(contents)[:3])
        if isinstance(contents, dict)
        else ""
    )
    return f"an object with {keys}" if keys else type(contents).__name__
