"""Made-up results of an evaluation, plausible enough for tables, figures and pages."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from duo_id.patterns.files import contents_of
from duo_id.patterns.pattern import HeadPattern
from duo_id.report.rows import ASKED

TASKS = ("needle-words", "json-lookup", "language", "ruler-multivalue")
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
LENGTHS, SPARSITIES = (1000, 2000), (0.25, 0.5, 0.75)
HARM = {"full": 0.0, "found": 0.3, "snapkv": 0.8, "streaming": 2.0, "window": 2.4, "random": 3.0}  # at sparsity 1
MODEL = {
    "name": "Tiny-4L",
    "id": "nobody/Tiny-4L",
    "revision": "main",
    "source": "random",
    "layers": 4,
    "gated_layers": 4,
    "kv_heads": 2,
    "heads": 4,
    "dtype": "float32",
}


def a_pattern(seed: int = 0, layers: int = 4, kv_heads: int = 2) -> HeadPattern:
    """Random gates."""
    scores = torch.rand(layers, kv_heads, generator=torch.Generator().manual_seed(seed))
    return HeadPattern(scores, 16, 64, provenance={"model": {"id": MODEL["id"]}, "seed": seed})


def line_up(
    patterns: tuple[str, ...] = ("found",), sparsities: tuple[float, ...] = SPARSITIES, peers: bool = True
) -> list[dict[str, Any]]:
    """Full attention, patterns and, with `peers`, all their baselines."""
    lineup = [("full", "full", 0.0, None)]
    for sparsity in sparsities:
        lineup += [("pattern", name, sparsity, None) for name in patterns]
        if peers:
            lineup += [("baseline", "random", sparsity, seed) for seed in range(5)]
            lineup += [("baseline", name, sparsity, None) for name in ("streaming", "window")]
            lineup += [("eviction", "snapkv", sparsity, None)]
    keys = ("kind", "heads", "sparsity", "seed")
    notes = {"snapkv": "question not seen while evicting", "streaming": "sink 16, latest tokens at equal bytes"}
    return [dict(zip(keys, key, strict=True)) | {"note": notes.get(key[1], "")} for key in lineup]


def saved_results(
    samples: int = 4,
    tasks: tuple[str, ...] = TASKS,
    lengths: tuple[int, ...] = LENGTHS,
    contenders: list[dict[str, Any]] | None = None,
    patterns: dict[str, HeadPattern] | None = None,
    **changes: Any,
) -> dict[str, Any]:
    """The contents of `results.json` of an evaluation, a function of the arguments only.

    Args:
        samples: of each task and length.
        tasks: some of `TASKS`.
        lengths: tokens.
        contenders: as `line_up` gives them.
        patterns: by name.
        changes: other values of top-level keys.
    """
    patterns = {"found": a_pattern()} if patterns is None else patterns
    lineup = line_up(tuple(patterns)) if contenders is None else contenders
    random = np.random.default_rng(0)
    rows = []
    for task in tasks:
        depths = DEPTHS if task in ("needle-words", "language") else (None,) * 2
        for length in lengths:
            for index in range(samples):
                ease = random.normal(0, 0.1)
                for question, depth in enumerate(depths):
                    noise, draw = random.normal(0, 0.05), random.random()
                    for contender in lineup:
                        row = _row(task, length, index, question, depth, contender, ease + noise, draw)
                        rows.append(row)
    return {
        "schema": "duo_id/results",
        "version": 1,
        "model": MODEL,
        "patterns": {name: contents_of(pattern) for name, pattern in patterns.items()},
        "contenders": lineup,
        "chat_template": False,
        "split": "test",
        "seed": 0,
        "samples": samples,
        "settings": {"tasks": list(tasks), "lengths": list(lengths), "data": {"haystack": {"source": "embedded"}}},
        "versions": {"duo_id": "0.1", "torch": "2.13.0", "device": "cpu"},
        "rows": rows,
    } | changes


def save(folder: Path, results: dict[str, Any]) -> Path:
    """Write results to a run folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps(results))
    return folder


def _row(
    task: str,
    length: int,
    index: int,
    question: int,
    depth: float | None,
    contender: dict[str, Any],
    noise: float,
    draw: float,
) -> dict[str, Any]:
    cache, tokens = contender.get("cache"), 20 if task == "language" else 6
    sparsity = contender["sparsity"] if cache is None else 1 - cache
    harm = 0.1 if contender["kind"] == "spans" else HARM.get(contender["heads"], 0.5)
    harm *= sparsity**2 * (1 + 0.05 * (contender["seed"] or 0))
    harm *= 1 + 0.5 * (length / 2000) - (depth or 0.5) * 0.6
    wrong = harm > 0 and (index * 7 + question * 3) % 5 / 50
    loss = 0.4 + {"language": 2.0}.get(task, 0.0) + harm * (1 if task != "language" else 0.1) + noise + wrong
    chance = float(np.exp(-harm) * 0.9)
    right = draw < chance
    generated = task != "language"
    share = (1 - sparsity) + sparsity * min(length, 80) / length if cache is None else cache
    return {
        "task": task,
        "length": length,
        "index": index,
        "question": question,
        "depth": depth,
        **{key: contender.get(key) for key in ASKED},
        "loss": tokens * max(loss, 0.01),
        "kl": tokens * harm * 0.8,
        "tokens": tokens,
        "correct": round(tokens * min(1.0, chance + 0.1 * draw)),
        "score": float(right) if generated else None,
        "exact": right if generated else None,
        "text": ("amber harbour" if right else "the <b>harbour</b> of & amber") if generated else None,
        "bytes": round(length * 4 * 2 * 2 * 16 * 4 * share),
    }
