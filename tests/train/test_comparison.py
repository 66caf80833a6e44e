"""The comparison of masks: which rows there are, what each is scored under, and what the terminal shows."""

from dataclasses import replace
from io import StringIO
from statistics import stdev

import pytest
import torch
from rich.console import Console
from torch import Tensor

from duo_id.attention.functions import AttendFunction, Backends, masked_layers
from duo_id.attention.interface import attached, bound
from duo_id.attention.layers import AttentionLayer
from duo_id.common.errors import UserError
from duo_id.models.language_model import LanguageModel
from duo_id.models.loading import byte_tokenizer
from duo_id.patterns.needs import SpanNeeds
from duo_id.patterns.pattern import HeadMask, HeadPattern
from duo_id.patterns.random_masks import random_mask
from duo_id.patterns.spans import HeadSpans
from duo_id.train import comparison
from duo_id.train.comparison import Result, check_window, compare, results_table, spans_like
from duo_id.train.scoring import Score, score
from tests.support.tiny import tiny_model

PATTERN = HeadPattern(torch.tensor([[0.1, 0.9], [0.3, 0.2], [0.8, 0.4]]), sink_size=2, recent_size=4)


def tiny() -> LanguageModel:
    return LanguageModel(tiny_model("llama"), byte_tokenizer(), "tiny", "tiny", None, "random")


def samples(count: int = 2) -> list[dict[str, Tensor]]:
    made = []
    for seed in range(count):
        ids = torch.randint(3, 96, (30 + seed,), generator=torch.Generator().manual_seed(seed))
        answers = torch.zeros_like(ids)
        answers[-8:-5], answers[-4:] = 1, 2
        made.append({"input_ids": ids, "answers": answers})
    return made


def test_each_row_is_scored_under_its_own_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    masks = []

    def watched(layers: list[AttentionLayer], mask: HeadMask, backends: Backends) -> dict[int, AttendFunction]:
        masks.append(mask)
        return masked_layers(layers, mask, backends)

    monkeypatch.setattr(comparison, "masked_layers", watched)
    model = tiny()
    full = [score(model, sample) for sample in samples()]
    results = compare(model, PATTERN, samples(), [0.5, 1 / 3], random_masks=2, seed=7)
    restored = [score(model, sample) for sample in samples()]
    with (
        attached(model.model) as layers,
        bound(layers, masked_layers(layers, PATTERN.binarize(sparsity=0.5), Backends())),
    ):
        masked = [score(model, sample) for sample in samples()]

    assert [(row.heads, row.sparsity, row.seed) for row in results] == [
        ("full", 0.0, None),
        ("found", 0.5, None),
        ("random", 0.5, 7),
        ("random", 0.5, 8),
        ("found", 1 / 3, None),
        ("random", 1 / 3, 7),
        ("random", 1 / 3, 8),
        ("streaming", 1.0, None),
    ]
    assert [int((~mask.retrieval).sum()) for mask in masks] == [0, 3, 3, 3, 2, 2, 2, 6]
    assert all((mask.sink_size, mask.recent_size) == (2, 4) for mask in masks)
    assert masks[1] == PATTERN.binarize(sparsity=0.5)
    assert masks[2] == random_mask(3, 2, 0.5, 7, sink_size=2, recent_size=4)
    assert masks[2] != masks[3]
    assert full == restored, "afterwards the model is as it was"
    for row, expected_scores in ((results[0], full), (results[1], masked)):
        for scored, expected in zip(row.samples, expected_scores, strict=True):
            assert scored.loss == pytest.approx(expected.loss, abs=1e-4)
            assert replace(scored, loss=0) == replace(expected, loss=0)
    assert len({row.summary()["loss"] for row in results}) > 4, "different masks score differently"


def test_spans_have_the_bytes_of_the_mask_beside_them() -> None:
    costs = torch.rand((3, 2, 3), generator=torch.Generator().manual_seed(0)).sort(-1, descending=True).values
    needs = SpanNeeds((2, 8, -1), torch.cat([costs[..., :2], torch.zeros(3, 2, 1)], -1))
    pattern, model = replace(PATTERN, needs=needs), tiny()
    found = pattern.binarize(sparsity=0.5)
    spans = spans_like(pattern, found, 31)
    assert spans is not None
    as_spans = HeadSpans(found.spans, 2)
    assert as_spans.cache_share(31) - (31 - 10) / (6 * 31) < spans.cache_share(31) <= as_spans.cache_share(31)
    results = compare(model, pattern, samples(), [0.5], random_masks=0, seed=7)
    assert [row.heads for row in results] == ["full", "found", "spans", "streaming"]
    with attached(model.model) as layers, bound(layers, masked_layers(layers, spans, Backends())):
        expected = [score(model, sample) for sample in samples()]
    for scored, by_hand in zip(results[2].samples, expected, strict=True):
        assert scored.loss == pytest.approx(by_hand.loss, abs=1e-4)
    assert spans_like(PATTERN, found, 31) is None, "without needs"
    wide = replace(pattern, needs=SpanNeeds((25, 28, -1), needs.costs))
    assert spans_like(wide, PATTERN.binarize(sparsity=1), 31) is None, "no spans are that small"


def test_random_masks_leave_layers_without_gates_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    pattern = HeadPattern(PATTERN.scores, 2, 4, gated_layers=(0, 2))
    masks = []

    def watched(layers: list[AttentionLayer], mask: HeadMask, backends: Backends) -> dict[int, AttendFunction]:
        masks.append(mask)
        return {}

    monkeypatch.setattr(comparison, "masked_layers", watched)
    compare(tiny(), pattern, samples(1), [0.5], random_masks=5, seed=0)
    assert all(mask.retrieval[1].all() for mask in masks)
    assert [int((~mask.retrieval).sum()) for mask in masks] == [0, 2, *[2] * 5, 4]


def test_summary_gives_each_sample_one_vote_and_pools_the_sums() -> None:
    row = Result("found", 0.5, None, (Score(6.0, 1, 2, 0, 1), Score(2.0, 6, 6, 3, 3))).summary()
    assert row == {
        "heads": "found",
        "sparsity": 0.5,
        "seed": None,
        "answer_loss": (3 + 1 / 3) / 2,
        "token_accuracy": 0.75,
        "exact_answers": 0.5,
        "loss": 8.0,
        "correct": 7,
        "tokens": 8,
        "exact": 3,
        "answers": 4,
    }


def test_table_has_a_row_for_each_kind_and_the_spread_of_random_masks() -> None:
    def row(heads: str, sparsity: float, loss: float, seed: int | None = None) -> Result:
        return Result(heads, sparsity, seed, (Score(4 * loss, 3, 4, 1, 2),))

    results = [
        row("full", 0.0, 1.0),
        row("found", 0.5, 1.25),
        row("random", 0.5, 2.0, 0),
        row("random", 0.5, 3.0, 1),
        row("streaming", 1.0, 4.0),
    ]
    console = Console(width=80, record=True, file=StringIO())
    console.print(results_table(results, "a title"))
    lines = console.export_text().splitlines()
    (full_row,), (found_row,) = ([line for line in lines if name in line] for name in ("full attention", "found mask"))
    (random_row,), (streaming_row,) = (
        [line for line in lines if name in line] for name in ("random masks (2)", "all heads stream")
    )
    assert lines[0].startswith("a title")
    assert lines.index(full_row) < lines.index(found_row) < lines.index(random_row) < lines.index(streaming_row)
    assert all(part in found_row for part in ("0.5", "1.250", "75.0 %", "50.0 %"))
    assert "±" not in found_row
    assert f"2.500 ± {stdev([2, 3]):.3f}" in random_row
    assert "75.0 ± 0.0 %" in random_row
    assert "4.000" in streaming_row


def test_samples_within_the_window_are_refused() -> None:
    sample = {"input_ids": torch.zeros(20, dtype=torch.long)}
    check_window([{"input_ids": torch.zeros(3, dtype=torch.long)}, sample], 4, 15)
    with pytest.raises(UserError, match=r"longest sample has 20 tokens.*sink_size=4.*recent_size=16.*length_max"):
        check_window([sample], 4, 16)
