"""Spans that heads were built to need are found, from curvature and from prices."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from duo_id.common.errors import UserError
from duo_id.common.integrity import sealed
from duo_id.methods import spans
from duo_id.methods.run import Run
from duo_id.methods.settings import SpanSettings
from duo_id.methods.span_prices import PRICES_FILE, SpanPrices
from duo_id.patterns.pattern import HeadPattern
from duo_id.step.distillation import Distillation
from duo_id.step.objectives import OBJECTIVES
from tests.methods.conftest import gated_model_of
from tests.support.planted import random_sample

MakeModel = Callable[..., PreTrainedModel]
TOKENS, LEVELS, SHARPNESS = 220, [8, 64, 128], 40.0
DISTANCES = [[4, 180, 40], [50, 5, 170]]  # what each head looks back to, by layer
NEEDED = torch.tensor([[8, -1, 64], [64, 8, -1]], dtype=torch.int32)


def model_with_spans(make_model: MakeModel) -> PreTrainedModel:
    """Each head attends to one distance, whatever the tokens: its queries and keys are constant but for rotations."""
    model = make_model(
        "qwen2", num_hidden_layers=2, num_attention_heads=3, num_key_value_heads=3, hidden_size=48,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4},
    )  # fmt: skip
    dim = 16
    frequencies = 1e4 ** (-torch.arange(dim // 2) * 2 / dim)
    with torch.no_grad():
        for layer, distances in zip(model.model.layers, DISTANCES, strict=True):
            attention = layer.self_attn
            attention.q_proj.weight.zero_(), attention.k_proj.weight.zero_()
            for head, distance in enumerate(distances):
                of_head = slice(dim * head, dim * (head + 1))
                angles = -frequencies * distance
                attention.q_proj.bias[of_head] = SHARPNESS * torch.cat([angles.cos(), angles.sin()])
                attention.k_proj.bias[of_head] = torch.cat([torch.ones(dim // 2), torch.zeros(dim // 2)])
    return model


class Samples:
    """Training samples of one length."""

    def samples(self, split: str, count: int) -> list[Any]:
        return [random_sample(TOKENS, seed, 12) for seed in range(count)]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Runs save their prices in the working folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def found(make_model: MakeModel, **changes: Any) -> HeadPattern:
    settings = SpanSettings("spans", 2, 16, levels=LEVELS, **{"samples": 12, "curvature_samples": 2} | changes)
    with gated_model_of(model_with_spans(make_model), settings.window) as gated_model:
        return spans.find(gated_model, Samples(), settings, Run())  # type: ignore[arg-type]


def exact_share() -> float:
    kept = [TOKENS if span < 0 else span + 2 for span in NEEDED.flatten().tolist()]
    return math.nextafter(sum(kept) / (len(kept) * TOKENS), 1)


def test_planted_spans_are_found(make_model: MakeModel) -> None:
    pattern = found(make_model)
    assert pattern.needs is not None
    assert pattern.needs.levels == (*LEVELS, -1)
    assert pattern.allocate(cache=exact_share(), length=TOKENS).spans.equal(NEEDED)
    assert pattern.provenance["samples"] == 12
    retrieval = pattern.binarize(sparsity=4 / 6).retrieval
    assert retrieval.equal(NEEDED == -1), "at one window the far heads cost most"


def test_prices_alone_find_them(make_model: MakeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spans, "curvature", lambda gated_model, sample, levels: torch.zeros(2, 3, len(levels)))
    pattern = found(make_model, samples=40, budgets=[0.1, 0.9])
    assert pattern.allocate(cache=exact_share(), length=TOKENS).spans.equal(NEEDED)


def test_curvature_alone_finds_them_too(make_model: MakeModel) -> None:
    settings = SpanSettings("spans", 2, 16)
    levels = torch.tensor([*LEVELS, -1], dtype=torch.int32)
    with gated_model_of(model_with_spans(make_model), settings.window) as gated_model:
        costs = spans.curvature(gated_model, random_sample(TOKENS, 0, 12), levels)
    assert costs.shape == (2, 3, 4)
    needed = (levels == NEEDED[..., None]).int().argmax(-1)
    enough = torch.arange(4) >= needed[..., None]
    assert costs[enough].max() < 0.05 * costs[~enough].min()
    pattern = found(make_model, samples=0)
    assert pattern.allocate(cache=exact_share(), length=TOKENS).spans.equal(NEEDED)
    assert pattern.provenance["samples"] == 0


def test_a_step_is_priced_on_the_longest_samples_and_only_where_they_tell_its_spans_apart(
    make_model: MakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths = [90, 30, 220, 100]

    class Unequal:
        def samples(self, split: str, count: int) -> list[Any]:
            return [random_sample(length, seed, 12) for seed, length in enumerate(lengths[:count])]

    def curvature(gated_model: Any, sample: Any, levels: torch.Tensor) -> torch.Tensor:
        length = len(sample["input_ids"])
        steps = torch.tensor([0.5, 0.25, 1.0]) * length * torch.tensor([length > 10, length > 66, length > 130])
        return spans.costs_of(steps).expand(2, 3, -1)

    monkeypatch.setattr(spans, "curvature", curvature)
    settings = SpanSettings("spans", 2, 16, levels=LEVELS, samples=0, curvature_samples=4)
    with gated_model_of(model_with_spans(make_model), settings.window) as gated_model:
        everything = spans.find(gated_model, Unequal(), settings, Run())  # type: ignore[arg-type]
        settings = replace(settings, curvature_samples=2)
        lengths.sort()
        lengths[:2] = []
        longest = spans.find(gated_model, Unequal(), settings, Run())  # type: ignore[arg-type]
    assert everything.needs is not None
    assert longest.needs is not None
    steps = -everything.needs.costs.diff(dim=-1)[0, 0]
    torch.testing.assert_close(steps, torch.tensor([0.5 * 440 / 4, 0.25 * 410 / 3, 220.0]))
    steps = -longest.needs.costs.diff(dim=-1)[0, 0]
    torch.testing.assert_close(steps, torch.tensor([0.5 * 160, 0.25 * 160, 220.0]))


def test_an_interrupted_run_returns_what_it_has_if_asked(
    make_model: MakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    priced = []

    def interrupted(*arguments: Any) -> None:
        if len(priced) == 3:
            raise KeyboardInterrupt
        priced.append(arguments)

    monkeypatch.setattr(spans, "price", interrupted)
    settings = SpanSettings("spans", 2, 16, levels=LEVELS, samples=5, curvature_samples=1)
    with gated_model_of(model_with_spans(make_model), settings.window) as gated_model:
        pattern = spans.find(gated_model, Samples(), settings, Run(partial=True))  # type: ignore[arg-type]
        assert pattern.provenance["interrupted"]
        with pytest.raises(KeyboardInterrupt):
            spans.find(gated_model, Samples(), settings, Run())  # type: ignore[arg-type]


def test_a_resumed_run_ends_as_an_uninterrupted_one(make_model: MakeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = SpanSettings("spans", 2, 16, levels=LEVELS, samples=4, curvature_samples=1)
    with gated_model_of(model_with_spans(make_model), settings.window) as gated_model:
        whole = spans.find(gated_model, Samples(), settings, Run())  # type: ignore[arg-type]
        original, calls = spans.price, []

        def killed(*arguments: Any) -> None:
            calls.append(arguments)
            if len(calls) == 3:
                raise KeyboardInterrupt
            original(*arguments)

        monkeypatch.setattr(spans, "price", killed)
        with pytest.raises(KeyboardInterrupt):
            spans.find(gated_model, Samples(), settings, Run())  # type: ignore[arg-type]
        again = Run(resume=True, named_pattern=lambda: pytest.fail("its order is in the prices"))
        resumed = spans.find(gated_model, Samples(), settings, again)  # type: ignore[arg-type]
        assert len(calls) == 3 + 2, "two of the four were saved"
    assert resumed.needs == whole.needs
    assert resumed.scores.equal(whole.scores)
    assert resumed.provenance["seconds_before"] > 0


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        pytest.param({"levels": [8, 65, 128, -1]}, "other heads or spans", id="levels"),
        pytest.param({"saved": [0.0]}, "does not hold 36 prices", id="too few"),
        pytest.param({"count": -1}, "count", id="negative"),
    ],
)
def test_prices_of_something_else_are_refused(change: dict[str, Any], reason: str, folder: Path) -> None:
    levels, path = torch.tensor([*LEVELS, -1], dtype=torch.int32), folder / PRICES_FILE
    SpanPrices(torch.zeros(2, 3, 4)).write(path, levels, 1.0)
    assert SpanPrices.read(path, levels, (2, 3))[1] == 1.0
    path.write_text(json.dumps(sealed(json.loads(path.read_text()) | change)))
    with pytest.raises(UserError, match=rf"^resume: .*{reason}"):
        SpanPrices.read(path, levels, (2, 3))


def test_levels_follow_the_window_and_the_samples() -> None:
    assert SpanSettings("spans", 64, 256).levels_up_to(8000) == (128, 256, 512, 1024, 2048, 4096, -1)
    assert SpanSettings("spans", 64, 256, levels=[512, 64, 9000]).levels_up_to(8000) == (64, 512, -1)
    with pytest.raises(UserError, match=r"samples of 100 tokens fit the sink .* lower method\.recent_size"):
        SpanSettings("spans", 64, 256).levels_up_to(100)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        pytest.param({"budgets": [0.6, 0.1]}, "ascending", id="order"),
        pytest.param({"budgets": [0.0, 0.1]}, "above 0", id="nothing"),
        pytest.param({"objective": "next_token"}, "compares with nothing", id="no teacher"),
    ],
)
def test_what_cannot_work_is_refused(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        SpanSettings("spans", 64, 256, **changes)


def test_a_short_sample_prices_the_step_to_the_smallest_span_that_holds_it(make_model: MakeModel) -> None:
    """All its heads see everything: one span of 64 or more is like another, so what is priced is 64 against 8."""
    settings, recorded = SpanSettings("spans", 2, 16), []
    levels = torch.tensor([*LEVELS, -1], dtype=torch.int32)
    prices = SpanPrices(torch.zeros(2, 3, 4), 1.0)
    prices.add = lambda *arguments: recorded.append(arguments)  # type: ignore[method-assign]
    with gated_model_of(model_with_spans(make_model), settings.window) as gated_model:
        distillation = Distillation(gated_model, OBJECTIVES["kl"])
        spans.price(distillation, random_sample(50, 0, 12), levels, prices, 1.0)
    ((level, rises, real),) = recorded
    assert level.eq(1).all()
    assert real.tolist() == [True, False, False]
    assert rises[1].eq(0).all()


def test_the_order_of_a_start_moves_curves_but_keeps_their_shape() -> None:
    costs = torch.tensor([[[4.0, 2.0, 0.0], [8.0, 6.0, 0.0], [0.5, 0.0, 0.0]]])
    found = spans.in_order(costs, torch.tensor([[0.9, 0.1, 0.5]]), 1)
    assert found[0, :, 1].tolist() == [6.0, 0.0, 2.0]
    assert found[0, 0].tolist() == [12.0, 6.0, 0.0]
    torch.testing.assert_close(found[0, 2], 2.0 * torch.tensor([12.5 / 8, 1.0, 0.0]))


def test_a_start_is_named_or_computed_first(make_model: MakeModel) -> None:
    far_first = HeadPattern(torch.tensor([[0.1, 0.9, 0.5], [0.6, 0.2, 0.8]]), 2, 16)
    settings = SpanSettings("spans", 2, 16, levels=LEVELS, samples=1, curvature_samples=1)
    with gated_model_of(model_with_spans(make_model), settings.window) as gated_model:
        run = Run(named_pattern=lambda: far_first)
        pattern = spans.find(gated_model, Samples(), settings, run)  # type: ignore[arg-type]
    assert pattern.binarize(sparsity=4 / 6).retrieval.equal(NEEDED == -1)
    with pytest.raises(UserError, match=r"method\.start=7"):
        SpanSettings("spans", 2, 16, start=7)
