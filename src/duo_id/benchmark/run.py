"""Measure decoding, prefill, memory and training steps under masks, compared with full attention."""

import importlib
import importlib.util
import json
import platform
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from duo_id.attention.functions import Backends
from duo_id.attention.interface import routed
from duo_id.attention.layers import AttentionLayer, gated_layers
from duo_id.benchmark.caches import CacheBench
from duo_id.benchmark.ceilings import measure_ceilings
from duo_id.benchmark.contenders import CacheContender, DualAttention, StaticAttention
from duo_id.benchmark.efficiency import read_baseline
from duo_id.benchmark.figures import largest_contexts, plot_benchmark, plot_largest_contexts, plotted_axes
from duo_id.benchmark.roofline import workload
from duo_id.benchmark.settings import BenchmarkSettings
from duo_id.benchmark.step_tables import plot_steps, step_tables
from duo_id.benchmark.tables import NAMES, results_tables, with_gains
from duo_id.benchmark.train_step import StepBench
from duo_id.common import cli
from duo_id.common.config import plain
from duo_id.common.errors import UserError, check
from duo_id.common.figures import save_figure
from duo_id.common.files import write_text
from duo_id.common.integrity import sealed
from duo_id.common.progress import progress_bar
from duo_id.common.tables import print_tables
from duo_id.distributed.launch import launch
from duo_id.distributed.ranks import Ranks
from duo_id.models.language_model import LanguageModel
from duo_id.models.loading import load_model
from duo_id.patterns.pattern import HeadPattern
from duo_id.patterns.saved import load_pattern
from duo_id.patterns.spans import ALL, HeadSpans


def benchmark(settings: BenchmarkSettings, folder: Path, overrides: list[str]) -> dict[str, Any]:
    """Measure full attention and masks.

    Args:
        settings: what to measure, on which model, at which sizes.
        folder: the run folder; `results.json` is written to it after every row, figures at the end.
        overrides: the command line behind the settings.

    Returns:
        the contents of `results.json`.

    Raises:
        UserError: the settings cannot work; the message names the override.
    """
    device, ranks = _device_and_ranks(settings)
    cli.console.quiet = not ranks.first
    with ranks.one_line_errors():
        return _measure(settings, Path(ranks.broadcast(str(folder))), overrides, device, ranks)


def _device_and_ranks(settings: BenchmarkSettings) -> tuple[torch.device, Ranks]:
    """The device of this process, after launching the others that share a training step."""
    if settings.task != "train_step":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu"), Ranks()
    step = settings.step
    device, ranks = launch(settings.trainer, step.sequence_parallel, step.shard, settings.batch_size, "batch_size")
    check(device.type in ("cuda", "cpu"), f"trainer.accelerator={device.type}: steps are measured on gpu and cpu")
    return device, ranks


def _measure(
    settings: BenchmarkSettings, folder: Path, overrides: list[str], device: torch.device, ranks: Ranks
) -> dict[str, Any]:
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "CPU"
    baseline_speeds = read_baseline(settings, device, card, ranks.data) if settings.compare else {}
    language_model = load_model(settings.model, device, settings.seed, ranks)
    layers = attention_layers(language_model)
    steps = settings.task == "train_step"
    contenders = [] if steps else line_up(settings, language_model, layers)
    ceilings = measure_ceilings(device, language_model.model.dtype)
    rates = f"{ceilings.bandwidth / 1e12:.3g} TB/s, {ceilings.flops / 1e12:.4g} TFLOP/s"
    cli.console.print(f"{language_model.name}; ceilings of this machine: {rates}", highlight=False, markup=False)
    results: dict[str, Any] = {
        "task": settings.task,
        "model": language_model.describe(layers),
        "device": card,
        "devices": ranks.world,
        "data_groups": ranks.data,
        "sequence_parallel": ranks.sequence,
        "sharded": ranks.sharded,
        "ceilings": vars(ceilings),
        "rows": [],
        "command": " ".join(["python -m duo_id.benchmark", *overrides]),
        "settings": plain(settings),
        "versions": cli.versions() | _kernel_versions(),
    }
    try:
        with progress_bar(cli.console) as progress:
            progress_task = progress.add_task("")

            def announce(phase: str) -> None:
                progress.update(progress_task, description=phase, refresh=True)

            if steps:
                bench = StepBench(settings, language_model, ceilings, folder, announce)
                total, rows = len(bench), bench.rows()
            else:
                work = workload(language_model.model, layers)
                cache_bench = CacheBench(settings, language_model.model, layers, work, ceilings, folder, announce)
                sizes = len(settings.context) * (len(settings.chunk_size) if settings.task == "prefill" else 1)
                total, rows = sizes * len(contenders), chain.from_iterable(map(cache_bench.rows, contenders))
            progress.update(progress_task, total=total)
            for row in rows:
                baseline = baseline_speeds.get((row["context"], row.get("blend", "")))
                if baseline and row["step"] == "ours" and "ms" in row:
                    row["efficiency"] = row["tokens_per_s"] / ranks.world / baseline
                results["rows"] = [*results["rows"], row] if steps else with_gains([*results["rows"], row])
                if ranks.first:
                    write_text(folder / "results.json", json.dumps(sealed(results), indent=1))
                line = _step_line(row) if steps else _cache_line(row)
                cli.say(line)
                progress.advance(progress_task)
    finally:  # also after Ctrl-C: show what was measured
        if results["rows"] and ranks.first:
            print_tables(cli.console, *(step_tables if steps else results_tables)(results))
            if steps:
                save_figure(plot_steps(results), folder / "train_step.png")
            for axis in [] if steps else plotted_axes(results):
                save_figure(plot_benchmark(results, axis), folder / f"{settings.task}_over_{axis}.png")
            if settings.task == "memory" and largest_contexts(results):
                save_figure(plot_largest_contexts(results), folder / "context_over_memory.png")
            cli.say(f"results and figures: {folder}")
    return results


def attention_layers(language_model: LanguageModel) -> list[AttentionLayer]:
    """The attention layers of the model.

    Raises:
        UserError: not all of them see the whole context, or the model has other kinds of layers.
    """
    with routed(language_model.model, Backends()) as layers:
        gated = gated_layers(language_model.model, layers)
    if len(gated) < language_model.num_layers:
        raise UserError(
            f"model={language_model.name}: only {len(gated)} of its {language_model.num_layers} layers see the whole "
            "context; benchmarks support only models of such layers"
        )
    return gated


def line_up(
    settings: BenchmarkSettings, language_model: LanguageModel, layers: list[AttentionLayer]
) -> list[CacheContender]:
    """The contenders, in order and for each `kv`: the baselines if `beside`, a mask for each sparsity, then the spans.

    Raises:
        UserError: the head pattern does not fit this model, or its windows cover every context.
    """
    shape = language_model.num_layers, layers[0].kv_heads
    if settings.heads is None:
        pattern = random_pattern(*shape, settings)
    else:
        pattern = load_pattern(settings.heads)
        pattern.check_fits(*shape, language_model.name)
    window, longest = pattern.sink_size + pattern.recent_size, settings.context[-1]
    check(
        window < longest,
        f"context={longest} fits in the window of sink_size + recent_size = {window}: give a longer one",
    )

    def under(sparsity: float, kv: str, name: str = "duo") -> DualAttention:
        return DualAttention(language_model, layers, batch, pattern.binarize(sparsity=sparsity), name, kv)

    batch = settings.batch_size
    contenders: list[CacheContender] = []
    for kv in settings.kv:
        if settings.beside and kv == "exact":
            contenders.append(StaticAttention(language_model, layers, batch))
        # in prefill both caches of exact keys call the same attention
        if settings.beside and (kv != "exact" or settings.task == "decode"):
            contenders.append(under(0, kv, "full-dual"))
        contenders += [under(sparsity, kv) for sparsity in settings.sparsity]
        if settings.spans:
            spans = shared_spans(pattern, settings.spans, settings.shares)
            contenders.append(DualAttention(language_model, layers, batch, spans, "spans", kv))
    return contenders


def random_pattern(layers: int, kv_heads: int, settings: BenchmarkSettings) -> HeadPattern:
    """A random order of the heads, that of `random_mask`."""
    ranks = torch.randperm(layers * kv_heads, generator=torch.Generator().manual_seed(settings.seed))
    return HeadPattern(ranks.view(layers, kv_heads), settings.sink_size, settings.recent_size)


def shared_spans(pattern: HeadPattern, spans: Sequence[int], shares: Sequence[float]) -> HeadSpans:
    """Spans by the order of a pattern: the lower the score, the shorter the span.

    Args:
        pattern: scores and the sink.
        spans: in tokens.
        shares: of the KV heads of gated layers, that have each span; the others see all tokens.
    """
    gated = list(pattern.gated_layers)
    order, ranked = pattern.scores[gated].flatten().argsort(stable=True), torch.full((pattern.gated_heads,), ALL)
    start, total = 0, 0.0
    for span, share in sorted(zip(spans, shares, strict=True)):
        total += share
        end = round(total * pattern.gated_heads)
        ranked[order[start:end]], start = span, end
    rows = torch.full(pattern.scores.shape, ALL)
    rows[gated] = ranked.view(len(gated), -1)
    return HeadSpans(rows, pattern.sink_size, pattern.gated_layers)


def _cache_line(row: dict[str, Any]) -> str:
    """A finished row on one line, with the seconds it took."""
    sizes = f"{row['context']:,} tokens" + (f", chunks of {row['chunk_size']:,}" if row["chunk_size"] else "")
    measured = f"{row['ms']:.4g} ms, {row['over_floor']:.3f} x floor" if "ms" in row else row["status"]
    seconds = ", ".join(f"{phase} {seconds:.1f}" for phase, seconds in row["seconds"].items())
    streaming = f" ({100 * row['sparsity']:.4g}% stream)" if row["sparsity"] else ""
    kv = "" if row["kv"] == "exact" else f", kv {row['kv']}"
    return f"{NAMES[row['attention']]}{streaming}{kv}, {sizes}: {measured}  [{seconds} s]"


def _step_line(row: dict[str, Any]) -> str:
    """A measured step on one line, after its memory plan."""
    measured = f"{row['ms']:.4g} ms, {row['over_floor']:.3f} x floor" if "ms" in row else row["status"]
    seconds = ", ".join(f"{phase} {seconds:.1f}" for phase, seconds in row["seconds"].items())
    plan = f"{row['plan']}\n" if row.get("plan") else ""
    return f"{plan}{row['step']}, {row['blend']} blend, {row['context']:,} tokens: {measured}  [{seconds} s]"


def _kernel_versions() -> dict[str, str | None]:
    """Versions of the kernels' dependencies; Triton only comes with torch for CUDA."""
    has_triton = importlib.util.find_spec("triton") is not None
    return {"triton": importlib.import_module("triton").__version__ if has_triton else None, "cuda": torch.version.cuda}
