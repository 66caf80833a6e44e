"""How far each head must see: spans under a byte budget, priced by backward passes at the spans chosen so far.

Spans per head by a profile and an optimiser: MoA (Fu et al. 2024, arXiv 2406.14909), which prices windows once, at full
attention. Prices at full attention miss that heads stand in for each other, so here they are taken where budgets lead.
"""

import time
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from duo_id.attention.functions import AttendFunction
from duo_id.attention.interface import bound
from duo_id.attention.priced import priced_layers
from duo_id.common.progress import progress_bar
from duo_id.data.datamodule import SampleModule
from duo_id.data.samples import Sample, batch_of_one
from duo_id.methods.gates import GOLDEN, SEED_OFFSET
from duo_id.methods.run import Run
from duo_id.methods.saliency import fisher
from duo_id.methods.settings import SpanSettings
from duo_id.methods.span_prices import PRICES_FILE, SpanPrices, costs_of
from duo_id.models.gated_model import GatedModel
from duo_id.patterns.allocation import best_levels, tokens_within
from duo_id.patterns.needs import SpanNeeds
from duo_id.patterns.pattern import HeadPattern
from duo_id.patterns.spans import kept_tokens
from duo_id.step.distillation import Distillation
from duo_id.step.objectives import OBJECTIVES
from duo_id.step.prepare import prepared_step

TINY = 1e-30  # below the cost of any head that needs something
CURVATURE_WEIGHT = 50  # prices of average samples that weigh as much in a head's cost; see docs/lab/log.md


def find(gated_model: GatedModel, samples: SampleModule, settings: SpanSettings, run: Run) -> HeadPattern:
    """Price spans at full attention, then on one sample after the other under the spans of a budget drawn anew."""
    run.on_accepted()
    started, path = time.perf_counter(), run.folder / PRICES_FILE
    if not run.resume:
        path.unlink(missing_ok=True)  # of an earlier run in this folder
    start = None if path.is_file() else run.named_pattern()
    training_samples = samples.samples("train", max(settings.samples, settings.curvature_samples))
    priced_samples = training_samples[: settings.samples]
    longest = max(len(sample["input_ids"]) for sample in training_samples)
    levels = torch.tensor(settings.levels_up_to(longest), dtype=torch.int32)
    nearest = int(torch.searchsorted(levels[:-1], gated_model.window.recent_size).clamp(max=len(levels) - 2))
    distillation = Distillation(gated_model, settings.resolved_objective, settings.tokens)
    provenance = dict[str, Any]()
    by_length = sorted(training_samples, key=lambda sample: -len(sample["input_ids"]))
    longest_samples = by_length[: settings.curvature_samples]  # they tell all spans apart
    with (
        prepared_step(distillation, replace(run.step, compile=False), len(levels) - 1) as apply_plan,
        progress_bar(run.console) as progress,
    ):
        bar = progress.add_task(settings.name, total=len(longest_samples) + len(priced_samples))
        apply_plan(longest)
        if path.is_file():
            prices, seconds_before = SpanPrices.read(path, levels, gated_model.shape)
            progress.advance(bar, len(longest_samples) + prices.count)
        else:
            costs, seconds_before = torch.zeros(*gated_model.shape, len(levels)), 0.0
            counts = torch.zeros(len(levels) - 1)
            for sample in longest_samples:
                costs += curvature(gated_model, sample, levels)
                counts += kept_tokens(levels, gated_model.window.sink_size, len(sample["input_ids"])).diff() > 0
                progress.advance(bar)
            costs = costs_of(-costs.diff(dim=-1) / counts)
            if start is not None:
                costs = in_order(costs, start.scores[[layer.index for layer in gated_model.layers]], nearest)
            prices = SpanPrices(costs, CURVATURE_WEIGHT * (len(priced_samples) + 1) / 2)
        try:
            for index, sample in enumerate(priced_samples[prices.count :], prices.count):
                fraction = (run.seed * SEED_OFFSET + index * GOLDEN) % 1
                low, high = settings.budgets
                price(distillation, sample, levels, prices, low * (high / low) ** fraction)
                prices.write(path, levels, seconds_before + time.perf_counter() - started)
                progress.advance(bar)
        except KeyboardInterrupt:
            if not run.partial:
                raise
            provenance["interrupted"] = True
    provenance |= {"samples": prices.count, "seconds_before": seconds_before}
    needs = SpanNeeds(tuple(levels.tolist()), prices.costs().float())
    return gated_model.pattern(needs.costs[..., nearest], needs, **provenance)


@torch.enable_grad()
def curvature(gated_model: GatedModel, sample: Sample, levels: Tensor) -> Tensor:
    """What each span costs by itself beside full attention in all other heads, to second order.

    Half the Fisher information of the share of that span: the KL divergence from full attention per scored token.

    Args:
        gated_model: the model.
        sample: a training sample.
        levels: (n,) int32, spans; -1 last.

    Returns:
        (gated layers, KV heads, n), 0 at the last.
    """
    full = torch.full(gated_model.shape, int(levels[-1]), dtype=torch.int32)
    others = levels[:-1, None, None].expand(-1, *gated_model.shape)
    shares = torch.zeros(others.shape, device=gated_model.device, requires_grad=True)
    distillation = Distillation(gated_model, OBJECTIVES["next_token"])
    with bound(gated_model.layers, _functions(gated_model, full, others, shares)):
        outputs = distillation.outputs(batch_of_one(sample, gated_model.device))
    costs = fisher(distillation, outputs, shares).float().cpu() / 2
    return torch.cat([costs, torch.zeros(1, *gated_model.shape)]).permute(1, 2, 0)


def in_order(costs: Tensor, scores: Tensor, level: int) -> Tensor:
    """Costs whose values at one level are the same but go to the heads in the order of other scores.

    A head's curve keeps its shape; one that costs nothing at this level gets the mean shape.

    Args:
        costs: (gated layers, KV heads, levels).
        scores: (gated layers, KV heads).
        level: the one at which the scores compare heads.
    """
    curves = costs.flatten(0, 1).clamp(min=0)
    at_level = curves[:, level]
    ordered = torch.zeros_like(at_level)
    ordered[scores.flatten().argsort(stable=True)] = at_level.sort().values
    mean = curves.sum(0) / at_level.sum().clamp(min=TINY)
    shapes = torch.where(at_level[:, None] > 0, curves / at_level[:, None].clamp(min=TINY), mean)
    return (ordered[:, None] * shapes).view(costs.shape)


def price(distillation: Distillation, sample: Sample, levels: Tensor, prices: SpanPrices, share: float) -> None:
    """Add the prices of a sample under the spans that its budget buys.

    Args:
        distillation: the model and the objective.
        sample: a training sample.
        levels: (n,) int32, spans; -1 last.
        prices: so far; added to.
        share: of the full cache's bytes.
    """
    gated_model = distillation.gated_model
    length = len(sample["input_ids"])
    kept = kept_tokens(levels, gated_model.window.sink_size, length)
    costs = prices.costs().flatten(0, 1).numpy()
    budget = max(tokens_within(share, len(costs) * length), len(costs) * int(kept[0]))
    bought = torch.tensor(best_levels(costs, kept.tolist(), range(len(costs)), budget))
    chosen = torch.searchsorted(kept, kept[bought]).view(gated_model.shape)  # of spans that are alike here the smallest
    neighbours = torch.stack([(chosen - 1).clamp(min=0), (chosen + 1).clamp(max=len(levels) - 1)])
    shares = torch.zeros(neighbours.shape, device=gated_model.device, requires_grad=True)
    batch = batch_of_one(sample, gated_model.device)
    teacher = distillation.teacher(batch)
    with bound(gated_model.layers, _functions(gated_model, levels[chosen], levels[neighbours], shares)):
        student = distillation.outputs(batch)
    loss = distillation.chunked.loss(student, teacher.outputs or student, teacher.weights)
    (rises,) = torch.autograd.grad(loss, shares)
    prices.add(chosen, rises, kept.diff() > 0)


def _functions(gated_model: GatedModel, spans: Tensor, others: Tensor, shares: Tensor) -> dict[int, AttendFunction]:
    return priced_layers(gated_model.layers, spans, others, shares, gated_model.window.sink_size, gated_model.backends)
