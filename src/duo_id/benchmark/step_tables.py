"""The tables and the figure of a benchmark of training steps."""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from duo_id.common.figures import COLORS, set_title, style
from duo_id.common.tables import TextTable

NAMES = {"ours": "ours", "paper": "published shape"}


def step_tables(results: Mapping[str, Any]) -> list[TextTable]:
    """Time and memory of each step, and its profile if there is one.

    Tokens per second are of all devices together; floors, MFU and peaks are per device.
    """
    title, rates = f"{results['model']['name']} on {machine(results)}", results["ceilings"]
    caption = f"floors at {rates['flops'] / 1e12:.4g} TFLOP/s and the measured full attention"
    headings = ["s", "tokens\n/s", "floor\ns", "over\nfloor", "MFU", "peak\nGiB"]
    has_efficiency = any("efficiency" in row for row in results["rows"])
    headings += ["effi-\nciency"] if has_efficiency else []
    lines = []
    for row in results["rows"]:
        peak = "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**30:.4g}"
        measured = ["OOM", "", f"{row['floor_ms'] / 1e3:.3g}", "", ""]
        if "ms" in row:
            measured = [
                f"{row['ms'] / 1e3:.4g}",
                f"{row['tokens_per_s']:,.0f}",
                f"{row['floor_ms'] / 1e3:.3g}",
                f"{row['over_floor']:.2f}",
                f"{100 * row['mfu']:.3g}%",
            ]
        efficiency = [f"{100 * row['efficiency']:.3g}%" if "efficiency" in row else ""] if has_efficiency else []
        lines.append([*_names(row), *measured, peak, *efficiency])
    table = _table(headings, lines, f"train step: {title}", caption)
    profiles = [row for row in results["rows"] if "profile" in row]
    if not profiles:
        return [table]
    has_communication = any("communication" in row for row in profiles)
    groups = list(dict.fromkeys(group for row in profiles for group in row["profile"]))
    times = [[*_names(row), *(f"{row['profile'].get(group, 0):.4g}" for group in groups)] for row in profiles]
    time_table = _table([group.replace(" ", "\n") for group in groups], times, "where the time goes (ms)")
    return [table, time_table, _communication_table(results["rows"])] if has_communication else [table, time_table]


def machine(results: Mapping[str, Any]) -> str:
    """The devices of a run, and how several of them shared a step."""
    devices = results.get("devices", 1)  # missing in older runs
    if devices == 1:
        return str(results["device"])
    weights = ", sharded weights" if results["sharded"] else ""
    return (
        f"{devices} x {results['device']} ({results['data_groups']} groups of samples x {results['sequence_parallel']} "
        f"parts of their tokens{weights})"
    )


def _communication_table(rows: Sequence[Mapping[str, Any]]) -> TextTable:
    """Communication of the first process's device, as a percentage of the step."""
    rows = [row for row in rows if "communication" in row]
    kinds = [name for name in rows[0]["communication"] if name != "step"]
    lines = []
    for row in rows:
        times = row["communication"]
        shares = [f"{100 * times[kind] / times['step']:.3g}" for kind in kinds]
        lines.append([*_names(row), *shares])
    return _table(kinds, lines, "communication (% of the step)")


def _names(row: Mapping[str, Any]) -> list[str]:
    return [NAMES[row["step"]], row["blend"], f"{row['context']:,}"]


def _table(headings: Sequence[str], rows: Sequence[list[str]], title: str, caption: str | None = None) -> TextTable:
    """A table whose rows begin with `_names`."""
    return TextTable(["step", "blend", "tokens", *headings], {"": rows}, title, caption, leading=3, left=2)


@style()
def plot_steps(results: Mapping[str, Any]) -> Figure:
    """Bars of time and peak memory by step with their values, since lengths differ widely, and floors."""
    rows = results["rows"]
    groups = list(dict.fromkeys((row["context"], row["blend"]) for row in rows))
    kinds = [name for name in NAMES if any(row["step"] == name for row in rows)]
    panels = 2 if any(row["peak_bytes"] for row in rows) else 1
    figure = Figure(figsize=(3.1 * panels + 0.2, 3.3))
    axes = list(figure.subplots(1, panels, squeeze=False).flat)
    width = 0.8 / len(kinds)
    for number, (kind, color) in enumerate(zip(kinds, COLORS, strict=False)):
        kind_rows = [row for row in rows if row["step"] == kind]
        offset = (number - (len(kinds) - 1) / 2) * width
        positions = [groups.index((row["context"], row["blend"])) + offset for row in kind_rows]
        seconds = [row.get("ms", 0) / 1e3 for row in kind_rows]
        gibibytes = [(row["peak_bytes"] or 0) / 2**30 for row in kind_rows]
        for panel, values in zip(axes, [seconds, gibibytes], strict=False):
            bars = panel.bar(positions, values, width, color=color, label=NAMES[kind] if panel is axes[0] else None)
            panel.bar_label(bars, [f"{value:.3g}" if value else "" for value in values], fontsize=7)
        for panel in axes:
            for x, row in zip(positions, kind_rows, strict=True):
                if row["status"] == "OOM":
                    panel.text(x, 0, "OOM", color=color, ha="center", va="bottom", rotation=90)
    for index, (context, blend) in enumerate(groups):
        floor = next(row["floor_ms"] for row in rows if (row["context"], row["blend"]) == (context, blend)) / 1e3
        label = "floor" if index == 0 else None
        axes[0].hlines(floor, index - 0.45, index + 0.45, color="#555555", linestyle="--", linewidth=1.0, label=label)
    for panel, text in zip(axes, ["time of a step (s)", "peak memory (GiB)"], strict=False):
        panel.set_xticks(range(len(groups)), [f"{blend}\n{context:,}" for context, blend in groups])
        panel.set(xlabel="blend, tokens", ylabel=text)
        panel.grid(axis="y")
    figure.legend(loc="outside lower center", ncols=3)
    count = f"{results.get('devices', 1)} x " if results.get("devices", 1) > 1 else ""
    set_title(figure, f"{results['model']['name']}, {count}{results['device']}")
    return figure
