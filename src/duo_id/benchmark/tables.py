"""The gains of masks over full attention, and the tables of a run."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from duo_id.attention.choices import KV_FORMATS
from duo_id.common.documents import FIRST, Data, Line, Natural, NonNegative, Share
from duo_id.common.tables import TextTable

FULL = ("full", "full-dual")  # the baselines: SDPA over a static cache, and the dual cache without streaming heads
NAMES = {"full": "full, static cache", "full-dual": "full, dual cache", "duo": "duo", "spans": "spans"}
Measurement = dict[str, Any]


class MeasurementRow(Data):
    """A row on disk; fields missing from rows that ran out of memory have defaults."""

    attention: Literal["full", "full-dual", "duo", "spans"]
    sparsity: Share
    kv: Line = "exact"
    context: Natural
    chunk_size: Natural | None
    status: Line
    weights_bytes: Natural
    peak_bytes: Natural | None
    cache_bytes: Natural | None
    ms: NonNegative = 0.0
    floor_ms: NonNegative = 0.0


class MeasuredModel(Data):
    """The measured model."""

    name: Line


class BenchmarkResults(Data):
    """The results.json of a benchmark of decoding, prefill or memory, as far as figures read it."""

    task: Line
    model: MeasuredModel
    device: Line
    rows: Annotated[list[MeasurementRow], FIRST]


def memory(row: Mapping[str, Any]) -> int | None:
    """Peak bytes of a row; on the CPU, which does not count them, weights and cache; None if out of memory."""
    if row["status"] == "OOM":
        return None
    return row["peak_bytes"] or row["weights_bytes"] + row["cache_bytes"]


def kv_of(row: Mapping[str, Any]) -> str:
    """What the heads of a row keep that see all tokens; results of earlier versions do not say."""
    return str(row.get("kv", "exact"))


def with_gains(rows: Sequence[Mapping[str, Any]]) -> list[Measurement]:
    """The rows, those of masks with `speedup`, `memory_saving` and `floor_ratio` added.

    Each is full attention over duo at the same sizes and with the same `kv`, None where either is unknown. The faster
    baseline counts for time, the smaller one for memory.
    """
    compared = []
    for row in rows:
        same = ("context", "chunk_size", "batch_size")
        baselines = [
            other
            for other in rows
            if other["attention"] in FULL and all(other[key] == row[key] for key in same) and kv_of(other) == kv_of(row)
        ]
        gains = {
            "speedup": _ratio([other.get("ms") for other in baselines], row.get("ms")),
            "memory_saving": _ratio([memory(other) for other in baselines], memory(row)),
            "floor_ratio": _ratio([other.get("floor_ms") for other in baselines], row.get("floor_ms")),
        }
        compared.append(dict(row) | (gains if row["attention"] not in FULL else {}))
    return compared


def results_tables(results: Mapping[str, Any]) -> list[TextTable]:
    """Times and memory for the terminal.

    Args:
        results: as in results.json.
    """
    task, rates, order = results["task"], results["ceilings"], list(NAMES)
    title = f"{results['model']['name']} on {results['device']}"
    rows = sorted(
        results["rows"],
        key=lambda row: (
            row["context"],
            row["chunk_size"] or 0,
            order.index(row["attention"]),
            row["sparsity"],
            KV_FORMATS.index(kv_of(row)),
        ),
    )
    is_prefill = task == "prefill"
    names, time_cells, memory_cells = [], [], []
    for row in rows:
        out_of_memory = row["status"] == "OOM"
        masked = f"{row['attention']} {row['sparsity']:.3g}"
        name = {"full": "full SDPA", "full-dual": "full dual"}.get(row["attention"], masked)
        name += "" if kv_of(row) == "exact" else f" {kv_of(row)}"
        names.append([name, f"{row['context']:,}"] + ([f"{row['chunk_size']:,}"] if is_prefill else []))
        spread = 50 * (row["ms_max"] - row["ms_min"]) / row["ms"] if "ms" in row else None
        time_cells.append(
            [
                "OOM" if out_of_memory else _number(row.get("ms")),
                _cell(spread, ".2g", "%"),
                _number(row.get("tokens_per_s")),
                _number(row.get("floor_ms")),
                _cell(row.get("over_floor"), ".3f"),
                _cell(row.get("speedup"), ".2f", "x"),
                _cell(row.get("floor_ratio"), ".2f", "x"),
            ]
        )
        gibibytes = [None if value is None else value / 2**30 for value in (row["peak_bytes"], row["cache_bytes"])]
        memory_cells.append(
            [
                "OOM" if out_of_memory else _cell(gibibytes[0], ".4g"),
                _cell(row["weights_bytes"] / 2**30, ".4g"),
                _cell(gibibytes[1], ".4g"),
                _cell(row.get("memory_saving"), ".2f", "x"),
            ]
        )
    leading = ["attention", "context", *(["chunk"] if is_prefill else [])]
    bold = frozenset(("", number) for number, row in enumerate(rows) if row["attention"] not in FULL)

    def table(title: str, headings: Sequence[str], cells: Sequence[list[str]], caption: str | None = None) -> TextTable:
        lines = [[*first, *measured] for first, measured in zip(names, cells, strict=True)]
        return TextTable([*leading, *headings], {"": lines}, title, caption, len(leading), bold=bold)

    memories = table(f"memory: {title}", ["peak\nGiB", "weights\nGiB", "cache\nGiB", "full\n/ duo"], memory_cells)
    if task == "memory":
        return [memories]
    times = table(
        f"{task}: {title}",
        ["ms", "±", "tokens\n/s", "floor\nms", "over\nfloor", "full\n/ duo", "their\nfloors"],
        time_cells,
        f"±: half of max - min; floors at {rates['bandwidth'] / 1e12:.3g} TB/s, {rates['flops'] / 1e12:.4g} TFLOP/s",
    )
    groups = list(dict.fromkeys(group for row in rows for group in row.get("profile", {})))
    if not groups:
        return [times, memories]
    spent = [[_number(row.get("profile", {}).get(group, 0.0)) for group in groups] for row in rows]
    return [times, memories, table("where the time goes (ms)", [group.replace(" ", "\n") for group in groups], spent)]


def _ratio(full: Sequence[float | None], masked: float | None) -> float | None:
    measured = [value for value in full if value is not None]
    return min(measured) / masked if measured and masked else None


def _cell(value: float | None, form: str, unit: str = "") -> str:
    return "" if value is None else format(value, form) + unit


def _number(value: float | None) -> str:
    return _cell(value, ",.0f" if value is not None and value >= 1000 else ".4g")
