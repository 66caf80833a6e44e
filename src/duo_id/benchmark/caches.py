"""Measure decode steps, prefills and memory of all contenders, row by row."""

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from duo_id.attention.layers import AttentionLayer
from duo_id.benchmark.ceilings import Ceilings
from duo_id.benchmark.contenders import CacheContender
from duo_id.benchmark.profiling import PROFILED, profile_run
from duo_id.benchmark.roofline import Floor, Workload
from duo_id.benchmark.settings import BenchmarkSettings
from duo_id.benchmark.timing import (
    Stopwatch,
    Timing,
    measure_peak,
    none_if_out_of_memory,
    release,
    time_runs,
)
from duo_id.common.compat import cache_argument
from duo_id.deploy.graphs import capture_graph
from duo_id.deploy.prefill import read_in_chunks
from duo_id.models.quantised import inductor_options, stored
from duo_id.step.compiled import compiled_parts

STEPS_BEFORE = 2  # decode steps before the warm-up: one to compile, one on the stream of the capture


class CacheBench:
    """Measures contenders with their caches.

    Args:
        settings: the sizes, and the number of runs.
        model: the model.
        layers: its attention layers.
        work: its sizes, for the floors.
        ceilings: of the machine.
        folder: where traces are written.
        announce: called with contender, size and phase as each begins.
    """

    def __init__(
        self,
        settings: BenchmarkSettings,
        model: PreTrainedModel,
        layers: Sequence[AttentionLayer],
        work: Workload,
        ceilings: Ceilings,
        folder: Path,
        announce: Callable[[str], None],
    ) -> None:
        self.settings, self.model, self.layers, self.work, self.ceilings = settings, model, layers, work, ceilings
        self.folder = folder
        self.device: torch.device = model.device
        self.compiles = settings.compiles(self.device)
        self.subject = ""
        self.watch = Stopwatch(lambda phase: announce(f"{self.subject}: {phase}"))
        weights = {tensor.data_ptr(): tensor.nbytes for tensor in stored((*model.parameters(), *model.buffers()))}
        self.weights_bytes = sum(weights.values())

    def rows(self, contender: CacheContender) -> Iterator[dict[str, Any]]:
        """Measure one contender over all sizes; a size that runs out of memory is a row too."""
        measure = {"decode": self._decode, "prefill": self._prefill, "memory": self._memory}[self.settings.task]
        torch._dynamo.reset()  # or it would keep the code compiled for another contender
        release()
        with contender.installed():
            yield from measure(contender)

    def _memory(self, contender: CacheContender) -> Iterator[dict[str, Any]]:
        for context in self.settings.context:
            self._name(contender, context)
            yield self._row(contender, context, none_if_out_of_memory(partial(self.step_memory, contender, context)))

    def _decode(self, contender: CacheContender) -> Iterator[dict[str, Any]]:
        """One static cache serves all contexts: another would make a compiled step recompile.

        Peaks are measured beforehand with a cache of the right size, so that they are still those of each context.
        """
        contexts = self.settings.context[::-1]
        memory = {}
        for context in contexts:
            self._name(contender, context)
            memory[context] = none_if_out_of_memory(partial(self.step_memory, contender, context))
            release()
        options = inductor_options(self.model)
        forward = torch.compile(self.model, dynamic=False, options=options) if self.compiles else self.model
        cache: Cache | None = None
        for context in contexts:
            self._name(contender, context)
            floor = self.work.decode(self.settings.batch_size, context, contender.mask, contender.kv)
            measured = None
            if memory[context] is not None:
                if cache is None:
                    runs = self.settings.warmup + self.settings.repeats + PROFILED * self.settings.profile
                    slots = context + STEPS_BEFORE + runs
                    cache = none_if_out_of_memory(partial(contender.new_cache, slots))
                if cache is not None:
                    measured = none_if_out_of_memory(partial(self.step_time, contender, forward, cache, context))
            if measured is None:
                cache = None  # the next context is shorter and gets a smaller one
                release()
                yield self._row(contender, context, None, None, floor)
            else:
                timing, columns = measured
                yield self._row(contender, context, memory[context], timing, floor, tokens=1) | columns

    def _prefill(self, contender: CacheContender) -> Iterator[dict[str, Any]]:
        for context in self.settings.context:
            for chunk_size in self.settings.chunk_size:
                self._name(contender, context, chunk_size)
                measured = none_if_out_of_memory(partial(self.prefill_time, contender, context, chunk_size))
                release()
                timing, memory, columns = measured or (None, None, {})
                sizes = self.settings.batch_size, context, chunk_size
                floor = self.work.prefill(*sizes, contender.mask, contender.kv)
                row = self._row(contender, context, memory, timing, floor, tokens=context, chunk_size=chunk_size)
                yield row | columns

    @torch.no_grad()
    def step_memory(self, contender: CacheContender, context: int) -> tuple[int | None, int]:
        """Peak bytes of a decode step with a cache of exactly the size it needs, and the bytes of that cache."""
        with self.watch.phase("memory"):
            cache = contender.new_cache(context + 1)
            contender.fill(cache, context, self.settings.seed)
            step = decode_step(contender, self.model, cache, context, self.tokens(1))
            _, peak = measure_peak(step, self.device)
            return peak, contender.nbytes(cache)

    @torch.no_grad()
    def step_time(
        self, contender: CacheContender, forward: Callable[..., Any], cache: Cache, context: int
    ) -> tuple[Timing, dict[str, Any]]:
        """Time a decode step after `context` random tokens; also returns more columns: the backend and a profile."""
        with self.watch.phase("fill"):
            contender.fill(cache, context, self.settings.seed)
            backend = contender.choose_backend(cache, context)
        step = decode_step(contender, forward, cache, context, self.tokens(1))
        with self.watch.phase("compile" if self.compiles else "first step"):
            step()
        with self.watch.phase("capture"):
            run = capture_graph(step, self.device)
        with self.watch.phase("measure"):
            timing = time_runs(run, self.device, self.settings.repeats, self.settings.warmup)
        return timing, {"backend": backend} | self._profile(run)

    @torch.no_grad()
    def prefill_time(
        self, contender: CacheContender, context: int, chunk_size: int
    ) -> tuple[Timing, tuple[int | None, int], dict[str, Any]]:
        """Time the prefill of a random prompt; also returns its peak bytes and those of its cache, and a profile."""
        ids, cache, settings = self.tokens(context), contender.new_cache(context), self.settings

        def run() -> Tensor:
            return read_in_chunks(self.model, ids, cache, chunk_size)

        def clear() -> None:
            contender.clear(cache)

        def run_again() -> Tensor:
            clear()
            return run()

        with compiled_parts(self.model, self.layers, dynamic=False) if self.compiles else nullcontext():
            with self.watch.phase("warm up"):
                time_runs(run, self.device, settings.warmup, before=clear)
            with self.watch.phase("measure"):
                repeat = partial(time_runs, run, self.device, settings.repeats, before=clear)
                timing, peak = measure_peak(repeat, self.device)
            columns = self._profile(run_again)
        return timing, (peak, contender.nbytes(cache)), columns

    def tokens(self, count: int) -> Tensor:
        """Random tokens, (batch, count) int64."""
        generator = torch.Generator(self.device).manual_seed(self.settings.seed)
        shape, size = (self.settings.batch_size, count), self.model.config.get_text_config().vocab_size
        return torch.randint(size, shape, generator=generator, device=self.device)

    def _profile(self, run: Callable[[], object]) -> dict[str, Any]:
        """The column that says where the time of a run goes, if it is asked for."""
        if not self.settings.profile:
            return {}
        name = "_".join(re.findall(r"[\w.]+", self.subject.replace(",", "")))
        with self.watch.phase("profile"):
            return {"profile": profile_run(run, self.device, self.folder / f"trace_{name}.json")[0]}

    def _name(self, contender: CacheContender, context: int, chunk_size: int | None = None) -> None:
        chunks = "" if chunk_size is None else f" in chunks of {chunk_size:,}"
        streaming = f", {100 * contender.sparsity:.4g}% stream" if contender.sparsity else ""
        kv = "" if contender.kv == "exact" else f", kv {contender.kv}"
        self.subject = f"{contender.name}{streaming}{kv}, {context:,} tokens{chunks}"

    def _row(
        self,
        contender: CacheContender,
        context: int,
        memory: tuple[int | None, int] | None,
        timing: Timing | None = None,
        floor: Floor | None = None,
        *,
        tokens: int = 0,
        chunk_size: int | None = None,
    ) -> dict[str, Any]:
        """One row of results.json; `memory`: peak and cache bytes, None if out of memory."""
        row = {
            "attention": contender.name,
            "sparsity": contender.sparsity,
            "kv": contender.kv,
            "context": context,
            "chunk_size": chunk_size,
            "batch_size": self.settings.batch_size,
            "status": "OOM" if memory is None else "ok",
            "weights_bytes": self.weights_bytes,
            "peak_bytes": memory and memory[0],
            "cache_bytes": memory and memory[1],
            "backend": None,
            "seconds": self.watch.take(),
        }
        if floor is not None:
            floor_seconds = floor.seconds(self.ceilings)
            row |= {"floor_ms": 1e3 * floor_seconds, "floor_bytes": floor.bytes, "floor_flops": floor.flops}
            if timing is not None:
                row |= timing.summary() | {
                    "tokens_per_s": tokens * self.settings.batch_size / timing.median,
                    "over_floor": timing.median / floor_seconds,
                }
        return row


def decode_step(
    contender: CacheContender, forward: Callable[..., Any], cache: Cache, context: int, ids: Tensor
) -> Callable[[], Tensor]:
    """A decode step after `context` tokens that can be repeated and captured.

    Args:
        contender: the installed one.
        forward: the model or its compiled form.
        cache: filled, with a slot for each run; only the device counts the runs, not the host.
        context: tokens in the cache.
        ids: (batch, 1), the new token.

    Returns:
        a function that returns the logits, (batch, 1, vocabulary).
    """
    positions, cache_arguments = torch.full_like(ids, context), {cache_argument(contender.model): cache}

    def step() -> Tensor:
        contender.set_position(context)
        return forward(input_ids=ids, position_ids=positions, use_cache=True, **cache_arguments).logits

    return step
