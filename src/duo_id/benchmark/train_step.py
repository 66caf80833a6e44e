"""Measure training steps: ours, the one in the published shape, and the floor of both.

Several devices share only our step. Every process measures; the slowest time and the highest peak count.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from duo_id.attention.blends import BLENDS
from duo_id.attention.full import full_attention
from duo_id.attention.interface import attached
from duo_id.attention.layers import AttentionLayer
from duo_id.attention.softmax import Softmax
from duo_id.attention.ulysses import head_shares
from duo_id.attention.window import Window
from duo_id.benchmark.ceilings import Ceilings
from duo_id.benchmark.profiling import profile_run
from duo_id.benchmark.roofline import workload
from duo_id.benchmark.settings import BenchmarkSettings
from duo_id.benchmark.timing import Stopwatch, Timing, measure_peak, none_if_out_of_memory, release, time_runs
from duo_id.common.errors import UserError
from duo_id.data.samples import UNSCORED, shared_weights, split_batch, with_scored
from duo_id.models.gated_model import GatedModel
from duo_id.models.language_model import LanguageModel
from duo_id.step.devices import shared_step
from duo_id.step.objectives import OBJECTIVES
from duo_id.step.paper_shape import SHAPES
from duo_id.step.prepare import prepared_step
from duo_id.step.settings import StepSettings

SCORED = 512  # tokens that the loss covers, at the end of a sample
BACKWARD = 2.5  # arithmetic of attention's backward pass, in forward passes: five products instead of two


class StepBench:
    """Measures steps row by row.

    Args:
        settings: what to measure.
        language_model: the model, possibly sharded over several processes.
        ceilings: of the machine.
        folder: where traces are written.
        announce: called with each phase as it begins.
    """

    def __init__(
        self,
        settings: BenchmarkSettings,
        language_model: LanguageModel,
        ceilings: Ceilings,
        folder: Path,
        announce: Callable[[str], None],
    ) -> None:
        self.settings, self.model, self.ceilings, self.folder = settings, language_model, ceilings, folder
        self.device: torch.device = language_model.model.device
        self.ranks = language_model.ranks
        self.window = Window(settings.sink_size, settings.recent_size)
        self.subject = ""
        self.watch = Stopwatch(lambda phase: announce(f"{self.subject}: {phase}"))
        ours = replace(settings.step, compile=settings.compiles(self.device))
        paper = replace(settings.step, shape="paper", memory="least", compile=False)
        with_paper = settings.beside and self.ranks.world == 1
        self.steps = {"paper": paper} if ours.shape == "paper" else {"ours": ours}
        if with_paper:
            self.steps["paper"] = paper
        limit = language_model.max_length
        if limit is not None and settings.context[-1] > limit:
            raise UserError(
                f"context={settings.context[-1]}: {language_model.name} supports {limit} tokens; "
                f"+model.config.max_position_embeddings={settings.context[-1]} raises that"
            )

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.settings.context) * len(self.settings.blend) * len(self.steps)

    def rows(self) -> Iterator[dict[str, Any]]:
        """A row for each length, blend and shape of step; one that runs out of memory is a row too."""
        for context in self.settings.context:
            attention: tuple[float, float] | None = None
            for blend in self.settings.blend:
                for name, step in self.steps.items():
                    self.subject = f"{name}, {blend} blend, {context:,} tokens"
                    release()
                    with attached(self.model.model, step.backends, self.ranks.group) as layers:
                        attention = attention or self.attention_seconds(layers[0], context)
                        yield self._row(name, step, layers, blend, context, attention)

    def attention_seconds(self, layer: AttentionLayer, context: int) -> tuple[float, float]:
        """Best times of this process's full attention in a layer, forward and backward: the ceilings at this length."""
        batch, dtype = self.settings.batch_size // self.ranks.data, self.model.model.dtype
        rank_heads, rank_kv_heads = head_shares(layer.heads, layer.kv_heads, self.ranks.sequence)[self.ranks.part].sizes
        query, key, value = (
            torch.randn(batch, heads, context, layer.head_dim, device=self.device, dtype=dtype, requires_grad=True)
            for heads in (rank_heads, rank_kv_heads, rank_kv_heads)
        )

        def forward() -> Tensor:
            return full_attention(query, key, value, Softmax(), self.settings.step.full_backend)

        with self.watch.phase("ceilings"):
            out = forward()
            grad = torch.randn_like(out)
            forward_time = time_runs(forward, self.device, self.settings.repeats, warmup=1)
            backward_time = time_runs(
                lambda: torch.autograd.grad(out, (query, key, value), grad, retain_graph=True),
                self.device,
                self.settings.repeats,
                warmup=1,
            )
        return min(forward_time.runs), min(backward_time.runs)

    def _row(
        self,
        name: str,
        step: StepSettings,
        layers: Sequence[AttentionLayer],
        blend: str,
        context: int,
        attention: tuple[float, float],
    ) -> dict[str, Any]:
        settings, model, ranks = self.settings, self.model, self.ranks
        columns = dict[str, Any]()
        if ranks.world > 1:
            step, plan = shared_step(
                model.model, step, ranks, self.device, context, settings.batch_size, BLENDS[blend].needs_teacher
            )
            columns["plan"] = str(plan)
        gated_model = GatedModel(model, layers, self.window, step.backends)
        distillation = SHAPES[step.shape](gated_model, OBJECTIVES["hidden_l2"], blend=BLENDS[blend])
        batch, first = self._batch(context), self._batch(settings.first_context or context)
        alpha = torch.full(gated_model.shape, 0.5, device=self.device, requires_grad=True)

        def run(batch: dict[str, Any] = batch) -> Tensor:
            return ranks.mean(torch.autograd.grad(distillation.loss(alpha, batch), alpha)[0])

        def measure() -> tuple[Timing, int | None]:
            with prepared_step(distillation, step) as apply_plan:
                with self.watch.phase("compile" if step.compile else "first step"):
                    plan = apply_plan(batch["input_ids"].numel())
                    columns.setdefault("plan", None if plan is None else str(plan))
                    run(first)
                with self.watch.phase("measure"):
                    repeat = partial(time_runs, run, self.device, settings.repeats, settings.warmup, ranks.barrier)
                    timing, peak = measure_peak(repeat, self.device)
                    *runs, peak_of_all = ranks.reduce_max(*timing.runs, peak or 0, device=self.device)
                if settings.profile:
                    with self.watch.phase("profile"):
                        trace = self.folder / f"trace_{name}_{blend}_{context}.json" if ranks.first else None
                        columns["profile"], exchanged = profile_run(run, self.device, trace, ranks.barrier)
                        columns.update({"communication": exchanged} if exchanged else {})
                return Timing(tuple(runs)), int(peak_of_all) or None

        # No process can skip a step alone: with several, running out of memory ends the run.
        measured = none_if_out_of_memory(measure) if ranks.world == 1 else measure()
        floor, flops = self.floor(layers, blend, context, attention)
        row: dict[str, Any] = {
            "step": name,
            "blend": blend,
            "context": context,
            "batch_size": settings.batch_size,
            "status": "OOM" if measured is None else "ok",
            "peak_bytes": measured and measured[1],
            "floor_ms": 1e3 * floor,
            "flops": flops,
            "attention_ms": [1e3 * seconds for seconds in attention],
            "seconds": self.watch.take(),
            **columns,
        }
        if measured is not None:
            seconds = measured[0].median
            row |= measured[0].summary() | {
                "tokens_per_s": context * settings.batch_size / seconds,
                "over_floor": seconds / floor,
                "mfu": flops / seconds / self.ceilings.flops,
            }
        return row

    def floor(
        self, layers: Sequence[AttentionLayer], blend: str, context: int, attention: tuple[float, float]
    ) -> tuple[float, float]:
        """The least seconds of a step, and its floating-point operations, per device.

        Teacher, student and the gradients of the frozen layers' inputs take 6 operations per weight and token. Full
        attention counts as measured, forward and backward, everything else at the rate of the matrix product. The last
        of several layers is left out: few of its tokens are scored, and the others are not needed.
        """
        batch, window = self.settings.batch_size, min(context, self.window.sink_size + self.window.recent_size)
        counted = layers[:-1] or layers
        weights = workload(self.model.model, layers).linear * len(counted) / len(layers)
        linear = 6 * weights * batch * context / self.ranks.world
        forwards, backwards = {"student": (2, 1), "detached": (2, 0), "teacher": (1, 0)}[blend]
        pairs = context * (context + 1) // 2
        window_pairs = window * (window + 1) // 2 + (context - window) * window
        flops_per_pair = sum(4 * batch * layer.head_dim * layer.heads for layer in counted) / self.ranks.world
        streaming = flops_per_pair * window_pairs * (1 + BACKWARD)
        seconds = (linear + streaming) / self.ceilings.flops
        seconds += len(counted) * (forwards * attention[0] + backwards * attention[1])
        return seconds, linear + streaming + flops_per_pair * pairs * (forwards + BACKWARD * backwards)

    def _batch(self, context: int) -> dict[str, Any]:
        """This process's share of random samples whose last tokens are scored."""
        ranks, vocabulary = self.ranks, self.model.model.config.get_text_config().vocab_size
        generator = torch.Generator(self.device).manual_seed(self.settings.seed)
        ids = torch.randint(
            vocabulary, (self.settings.batch_size, context), generator=generator, device=self.device
        ).chunk(ranks.data)[ranks.data_rank]
        labels = torch.full_like(ids, UNSCORED)
        labels[:, -SCORED:] = ids[:, -SCORED:]
        batch: dict[str, Any] = {"input_ids": ids, "labels": labels, "attention_mask": None}
        if ranks.group is not None:
            batch = split_batch(batch, ranks.part, ranks.sequence)
        batch = with_scored(batch)
        weights = batch["weights"].to(self.device)
        return batch | {"weights": shared_weights(weights, ranks)}
