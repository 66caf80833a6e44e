"""Made-up results of benchmarks, for tests of tables and figures."""

from typing import Any

from duo_id.benchmark.tables import with_gains


def row(attention: str, sparsity: float, context: int, ms: float | None, peak: int, **changes: Any) -> dict[str, Any]:
    """A row of results.json; `ms` None: out of memory."""
    fits = ms is not None
    columns = {
        "attention": attention,
        "sparsity": sparsity,
        "context": context,
        "chunk_size": None,
        "batch_size": 1,
        "status": "ok" if fits else "OOM",
        "weights_bytes": 2**30,
        "peak_bytes": peak if fits else None,
        "cache_bytes": peak - 2**30 if fits else None,
        "floor_ms": context / 1e3 * (1 - sparsity) + 1,
    }
    if ms is not None:
        columns |= {"ms": ms, "ms_min": ms * 0.9, "ms_max": ms * 1.1, "tokens_per_s": 1e3 / ms, "over_floor": 1.1}
    return columns | changes


def results(task: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The contents of results.json, as far as tables and figures read it."""
    return {
        "task": task,
        "model": {"name": "a model"},
        "device": "a device",
        "ceilings": {"bandwidth": 4e12, "flops": 7e14},
        "rows": with_gains(rows),
    }


def decode() -> dict[str, Any]:
    """Two baselines, masks at two sparsities, two contexts; full attention runs out of memory at one."""
    rows = [
        row("full", 0.0, 1000, 8.0, 9 * 2**30),
        row("full", 0.0, 2000, None, 0),
        row("full-dual", 0.0, 1000, 6.0, 10 * 2**30),
        row("full-dual", 0.0, 2000, None, 0),
    ]
    for sparsity in (0.5, 0.75):
        rows += [
            row("duo", sparsity, context, context / 1e3 * 4 * (1 - sparsity), (1 + context // 1000) * 2**30)
            for context in (1000, 2000)
        ]
    return results("decode", rows)


def prefill() -> dict[str, Any]:
    """One baseline and one mask over two chunk sizes."""
    rows = [row("full", 0.0, 1000, 8000.0 + chunk, 9 * 2**30, chunk_size=chunk) for chunk in (1024, 4096)]
    rows += [row("duo", 0.5, 1000, 4000.0 + chunk, 5 * 2**30, chunk_size=chunk) for chunk in (1024, 4096)]
    return results("prefill", rows)
