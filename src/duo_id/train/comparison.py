"""Compare a pattern's masks with the full model, random masks at the same sparsity and all heads streaming."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import mean, stdev
from typing import Any

from rich.console import Console

from duo_id.attention.functions import Backends, masked_layers
from duo_id.attention.interface import attached, bound
from duo_id.common.errors import UserError
from duo_id.common.progress import progress_bar
from duo_id.common.tables import TextTable
from duo_id.models.language_model import LanguageModel
from duo_id.patterns.allocation import least_share
from duo_id.patterns.mask import HeadMask
from duo_id.patterns.pattern import HeadPattern
from duo_id.patterns.random_masks import random_like
from duo_id.patterns.spans import HeadSpans
from duo_id.train.scoring import Score, score, total

METRICS = ("answer_loss", "token_accuracy", "exact_answers")


@dataclass(frozen=True)
class Result:
    """The scores of one mask on the held-out samples.

    Attributes:
        heads: the kind of mask: full | found | spans (of the same bytes) | random | streaming.
        sparsity: fraction of the gated KV heads that stream.
        seed: of a random mask.
        samples: the score of each sample.
    """

    heads: str
    sparsity: float
    seed: int | None
    samples: tuple[Score, ...]

    def summary(self) -> dict[str, Any]:
        """The metrics, averaged over samples, and the pooled sums, as plain values.

        Samples have equal weight: a text of many labelled tokens counts as much as a short answer.
        """
        metrics = {metric: mean(getattr(score, metric) for score in self.samples) for metric in METRICS}
        mask = {"heads": self.heads, "sparsity": self.sparsity, "seed": self.seed}
        return mask | metrics | asdict(total(self.samples))


def compare(
    model: LanguageModel,
    pattern: HeadPattern,
    samples: Sequence[Mapping[str, Any]],
    sparsities: Sequence[float],
    random_masks: int,
    seed: int,
    backends: Backends | None = None,
    console: Console | None = None,
) -> list[Result]:
    """Score every mask on every sample, teacher-forced. Ranks that share a model must all call it; all get the results.

    Args:
        model: the language model.
        pattern: whose masks are compared.
        samples: held-out samples, see `duo_id.train.scoring.score`.
        sparsities: fractions of streaming heads.
        random_masks: number of random masks per sparsity.
        seed: of the random masks.
        backends: attention implementations.
        console: shows the progress; None: nothing does.
    """
    masks: list[tuple[str, float, int | None, HeadMask | HeadSpans]]
    masks = [("full", 0.0, None, pattern.binarize(sparsity=0))]
    longest = max(len(sample["input_ids"]) for sample in samples)
    for sparsity in sparsities:
        found = pattern.binarize(sparsity=sparsity)
        masks.append(("found", sparsity, None, found))
        if (spans := spans_like(pattern, found, longest)) is not None:
            masks.append(("spans", sparsity, None, spans))
        for drawn_seed in range(seed, seed + random_masks):
            masks.append(("random", sparsity, drawn_seed, random_like(pattern, sparsity, drawn_seed)))
    masks.append(("streaming", 1.0, None, pattern.binarize(sparsity=1)))
    backends = backends or Backends()
    results = []
    with (
        progress_bar(console or Console(quiet=True)) as progress,
        attached(model.model, backends, model.ranks.group) as layers,
    ):
        task = progress.add_task("scoring masks", total=len(masks) * len(samples))
        for heads, sparsity, mask_seed, mask in masks:
            scores = []
            with bound(layers, masked_layers(layers, mask, backends)):
                for sample in samples:
                    scores.append(score(model, sample))
                    progress.advance(task)
            results.append(Result(heads, sparsity, mask_seed, tuple(scores)))
    return results


def spans_like(pattern: HeadPattern, mask: HeadMask, length: int) -> HeadSpans | None:
    """The spans of a pattern that take the bytes of a mask at a length; None without needs, or if no spans do."""
    share = HeadSpans(mask.spans, mask.sink_size, mask.gated_layers).cache_share(length)
    if pattern.needs is None or share < least_share(pattern, length):
        return None
    return pattern.allocate(cache=share, length=length)


def pattern_loss(
    model: LanguageModel,
    pattern: HeadPattern,
    samples: Sequence[Mapping[str, Any]],
    sparsities: Sequence[float],
    backends: Backends | None = None,
) -> float:
    """The answer loss of the pattern's masks, in nats per token, averaged over samples and sparsities."""
    losses, backends = [], backends or Backends()
    with attached(model.model, backends, model.ranks.group) as layers:
        for sparsity in sparsities:
            with bound(layers, masked_layers(layers, pattern.binarize(sparsity=sparsity), backends)):
                losses.append(mean(score(model, sample).answer_loss for sample in samples))
    return mean(losses)


def check_window(samples: Sequence[Mapping[str, Any]], sink_size: int, recent_size: int) -> None:
    """Raise a `UserError` if no sample is longer than the window: every mask would be full attention."""
    longest = max(len(sample["input_ids"]) for sample in samples)
    if longest <= sink_size + recent_size:
        raise UserError(
            f"the longest sample has {longest} tokens, all within the window of sink_size={sink_size} and "
            f"recent_size={recent_size}: raise data.length_max"
        )


def results_table(results: Sequence[Result], title: str) -> TextTable:
    """The comparison as a table; random masks of one sparsity share a row, mean ± standard deviation."""
    groups: dict[tuple[str, float], list[dict[str, Any]]] = {}
    for result in results:
        groups.setdefault((result.heads, result.sparsity), []).append(result.summary())
    names = {
        "full": "full attention",
        "found": "found mask",
        "spans": "spans, same bytes",
        "streaming": "all heads stream",
    }
    ordered = sorted(groups.items(), key=lambda item: (item[0][1], item[0][0]))
    rows = [
        (
            names.get(heads, f"random masks ({len(summaries)})"),
            f"{sparsity:.4g}",
            _cell([summary["answer_loss"] for summary in summaries], "{:.3f}"),
            _cell([100 * summary["token_accuracy"] for summary in summaries], "{:.1f}", " %"),
            _cell([100 * summary["exact_answers"] for summary in summaries], "{:.1f}", " %"),
        )
        for (heads, sparsity), summaries in ordered
    ]
    return TextTable(
        ("heads", "streaming", "answer loss", "token accuracy", "exact answers"),
        {"": rows},
        title,
        "means over the samples; answer loss in nats per token",
        leading=2,
        bold=frozenset(("", number) for number, ((heads, _), _) in enumerate(ordered) if heads in ("found", "spans")),
    )


def _cell(values: Sequence[float], form: str, unit: str = "") -> str:
    spread = f" ± {form.format(stdev(values))}" if len(values) > 1 else ""
    return form.format(mean(values)) + spread + unit
