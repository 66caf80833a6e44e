"""Every method finds the planted head; searches can be gone on with."""

import io
import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor
from transformers import PreTrainedModel

from duo_id.common.errors import UserError
from duo_id.common.integrity import MARK, SEAL, unsealed
from duo_id.data.samples import Sample
from duo_id.methods import registry
from duo_id.methods.candidates import MaskLosses
from duo_id.methods.gated_model import Subject
from duo_id.methods.random import random_scores
from duo_id.methods.registry import ORDER, SCORES, SETTLING, mean_scores, search_scores, settled
from duo_id.methods.settings import METHODS, AttentionSettings, GateSettings, SaliencySettings, SearchSettings
from duo_id.patterns.pattern import HeadPattern
from tests.methods.conftest import haystack, subject_of
from tests.step.test_distillation import HYBRID
from tests.support.planted import planted_model, planted_sample, random_sample

MakeModel = Callable[..., PreTrainedModel]
CONSOLE = Console(file=io.StringIO())
WINDOW: dict[str, Any] = {"sink_size": 3, "recent_size": 8}
HEADS = [(0, 1), (1, 0), (2, 1)]


def test_every_method_but_training_is_here() -> None:
    trained = {name for name, schema in METHODS.items() if issubclass(schema, GateSettings)}
    assert set(SCORES) | {"random", "search"} == set(METHODS) - trained


def assert_first(scores: Tensor, layer: int, kv_head: int) -> None:
    assert scores.shape == (3, 2)
    assert scores.dtype == torch.float32
    assert int(scores.argmax()) == layer * 2 + kv_head, scores
    ranked = scores.flatten().sort().values
    assert ranked[-1] - ranked[-2] > 0.02 * ranked[-1], scores


@pytest.mark.parametrize(("layer", "kv_head"), HEADS)
@pytest.mark.parametrize("reduction", ["max", "mean"])
@pytest.mark.parametrize("name", ["attention_profile", "retrieval_score", "query_score", "reconstruction"])
def test_scores_from_attention_rank_the_planted_head_first(
    name: str, reduction: str, layer: int, kv_head: int, make_model: MakeModel
) -> None:
    with subject_of(planted_model(make_model, layer, kv_head)) as subject:
        samples = [planted_sample(seed, answered=True) for seed in range(6)]
        settings = AttentionSettings(name, **WINDOW, reduction=reduction)
        assert_first(mean_scores(subject, samples, settings, CONSOLE), layer, kv_head)


@pytest.mark.parametrize(("layer", "kv_head"), HEADS)
@pytest.mark.parametrize(
    "changes",
    [
        {"objective": "kl", "at": [0.75, 0.5]},
        {"objective": "hidden_l2", "at": [0.5]},
        {"objective": "layer_l2", "at": [0.9]},
        {"kind": "fisher", "at": [1.0]},
    ],
    ids=str,
)
def test_saliency_ranks_the_planted_head_first(
    changes: dict[str, Any], layer: int, kv_head: int, make_model: MakeModel
) -> None:
    answered = changes.get("objective", "kl") == "kl"  # what QUERY predicts, or QUERY's own hidden state
    with subject_of(planted_model(make_model, layer, kv_head)) as subject:
        samples = [planted_sample(seed, answered) for seed in range(6)]
        scores = mean_scores(subject, samples, SaliencySettings("saliency", **WINDOW, **changes), CONSOLE)
    assert_first(scores, layer, kv_head)


def searching(**changes: Any) -> SearchSettings:
    return SearchSettings("search", **({**WINDOW, "batch_tokens": 1000} | changes))


@pytest.mark.parametrize(("layer", "kv_head"), HEADS)
@pytest.mark.parametrize(
    ("strategy", "objective"), [("elimination", "kl"), ("selection", "kl"), ("elimination", "hidden_l2")]
)
def test_searches_rank_the_planted_head_first(
    strategy: str, objective: str, layer: int, kv_head: int, make_model: MakeModel, tmp_path: Path
) -> None:
    settings = searching(strategy=strategy, objective=objective)
    with subject_of(planted_model(make_model, layer, kv_head)) as subject:
        samples = [planted_sample(seed, objective == "kl") for seed in range(3)]
        scores, told = search_scores(subject, samples, settings, None, tmp_path, CONSOLE)
    assert_first(scores, layer, kv_head)
    torch.testing.assert_close(scores.flatten().sort().values, torch.linspace(0, 1, 6))
    assert told["samples"] == 3
    assert told["forwards"] > 0
    assert "budget" not in told


def test_the_mean_over_samples(make_model: MakeModel) -> None:
    settings = AttentionSettings("attention_profile", **WINDOW)
    with subject_of(make_model("llama")) as subject:
        samples = [random_sample(40, seed) for seed in range(3)]
        alone = [SCORES["attention_profile"](subject, sample, settings) for sample in samples]
        torch.testing.assert_close(mean_scores(subject, samples, settings, CONSOLE), torch.stack(alone).mean(0))


def test_heads_that_copy_equally_often_are_ordered_by_their_attention_to_the_needle(make_model: MakeModel) -> None:
    settings = AttentionSettings("retrieval_score", **WINDOW)
    with subject_of(make_model("llama")) as subject:
        samples = [haystack(60, (5, 40, 3), seed=seed) for seed in range(4)]
        alone = torch.stack([SCORES["retrieval_score"](subject, sample, settings) for sample in samples])
        copied, attention = alone.mean(0).flatten(1)
        scores = mean_scores(subject, samples, settings, CONSOLE).flatten()
    assert len(copied.unique()) < len(copied), "without equals there is nothing to see"
    assert len(scores.unique()) == len(scores)
    pairs = list(zip(copied.round(decimals=6).tolist(), attention.tolist(), strict=True))
    assert scores.argsort().tolist() == sorted(range(len(pairs)), key=lambda head: pairs[head])
    assert ((scores >= copied - 1e-6) & (scores <= copied + SETTLING + 1e-6)).all()


@pytest.mark.parametrize("seed", range(20))
def test_what_decides_among_equals_decides_nothing_else(seed: int) -> None:
    """Against Python's sort of pairs: scores of few values, some of them neighbours in float32, negative or large."""
    random = torch.Generator().manual_seed(seed)
    near = torch.tensor([0.3, 0.5, -2.0, 1e4])
    values = torch.cat([torch.rand(4, generator=random), torch.zeros(1), near, near.nextafter(torch.tensor(torch.inf))])
    scores = values[torch.randint(len(values), (30, 3), generator=random)]
    deciding = torch.rand(30, 3, generator=random, dtype=torch.float64)
    deciding.view(-1)[:2] = torch.tensor([0.0, 1.0])
    found = settled(scores.double(), deciding)
    assert (found.shape, found.dtype) == (scores.shape, torch.float32)
    assert ((found >= scores) & (found.double() <= scores.double() + 1.001 * SETTLING)).all()
    before, after, rank = scores.flatten(), found.flatten(), deciding.flatten()
    lower = before[:, None] < before
    assert (after[:, None] < after)[lower].all(), "no order of different scores changes"
    equal = (before[:, None] == before) & (rank[:, None] < rank)
    assert (after[:, None] <= after)[equal].all()
    zero = torch.isin(before, torch.zeros(1))
    assert after[zero].argsort().tolist() == rank[zero].argsort().tolist(), "where there is room, none stay equal"


def test_random_orders_are_a_function_of_their_seed() -> None:
    first = random_scores((6, 4), 5)
    assert torch.equal(random_scores((6, 4), 5), first)
    torch.testing.assert_close(first.flatten().sort().values, torch.linspace(0, 1, 24))
    orders = {tuple(random_scores((6, 4), seed).flatten().argsort().tolist()) for seed in range(20)}
    assert len(orders) == 20
    assert random_scores((1, 1), 0).tolist() == [[0]]
    assert random_scores((6, 4), 2**32 - 1).shape == (6, 4)


def samples() -> list[Sample]:
    return [random_sample(40, 1), random_sample(31, 2)]


def searched(subject: Subject, folder: Path, pattern: HeadPattern | None = None, **changes: Any) -> Any:
    return search_scores(subject, samples(), searching(**changes), pattern, folder, CONSOLE)


@pytest.mark.parametrize("strategy", ["elimination", "selection"])
@pytest.mark.parametrize("stop_at", range(1, 12))
def test_a_search_that_is_gone_on_with_ends_as_an_undisturbed_one(
    strategy: str, stop_at: int, make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped in any round, of the search or of the exchanges behind it."""
    changes: dict[str, Any] = {"strategy": strategy, "swap_at": 0.5, "max_swaps": 1, "swap_width": 3}
    plain, calls = MaskLosses.__call__, [0]

    def crooked(self: MaskLosses, masks: Tensor) -> Tensor:
        """Losses with which there is something to exchange."""
        calls[0] += 1
        if calls[0] == stop_at:
            raise KeyboardInterrupt
        closed = (~masks).flatten(1).float()
        together = closed[:, 1] * closed[:, 2] * closed[:, 5] * (closed.sum(1) == 3)
        return plain(self, masks) * 0.01 + closed @ torch.arange(6.0) - 20 * together

    monkeypatch.setattr(MaskLosses, "__call__", crooked)
    with subject_of(make_model("llama")) as subject:
        (tmp_path / "stopped").mkdir()
        with suppress(KeyboardInterrupt):  # the last ones find it over
            searched(subject, tmp_path / "stopped", **changes)
        calls[0] = stop_at
        scores, told = searched(subject, tmp_path / "stopped", **changes)
        again, told_again = searched(subject, tmp_path / "stopped", **changes)
        (tmp_path / "whole").mkdir()
        expected, expected_told = searched(subject, tmp_path / "whole", **changes)
    assert torch.equal(scores, expected)
    assert torch.equal(again, expected), "one that is over stays as it is"
    assert told["swaps"] == told_again["swaps"] == expected_told["swaps"] == 1
    assert told["budget"] == 0.5
    states = [json.loads((tmp_path / name / ORDER).read_text()) for name in ("stopped", "whole")]
    assert all(state.pop("seconds") > 0 for state in states)
    assert all(state.pop(SEAL).startswith(MARK) for state in states), "of the seconds too, which differ"
    assert states[0] == states[1]


def test_a_start_settles_the_heads_outside_and_hybrid_models_take_their_gated_rows(
    make_model: MakeModel, tmp_path: Path
) -> None:
    kv_heads = 2
    scores = torch.tensor([[0.1, 0.8], [1.0, 1.0], [0.6, 0.3], [1.0, 1.0]])
    start = HeadPattern(scores, 3, 8, gated_layers=(0, 2))
    with subject_of(make_model("gemma3_text", **HYBRID)) as subject:
        assert subject.shape == (2, kv_heads)
        found, _ = searched(subject, tmp_path, start, start="any", between=[0.25, 0.75])
        (tmp_path / "none").mkdir()
        settled, _ = searched(subject, tmp_path / "none", start, start="any", between=[0.5, 0.5])
    assert found.flatten()[0] == 0
    assert found.flatten()[1] == 1
    assert settled.flatten().argsort().tolist() == [0, 3, 2, 1]


@pytest.mark.parametrize("sparsity", [0.05, 0.95])
def test_a_budget_of_no_head_or_all_is_refused(sparsity: float, make_model: MakeModel, tmp_path: Path) -> None:
    with (
        subject_of(make_model("llama")) as subject,
        pytest.raises(UserError, match=r"swap_at=.* of 6 heads leaves none"),
    ):
        searched(subject, tmp_path, swap_at=sparsity, max_swaps=3)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        "3",
        "{}",
        '{"shape": [3, 2], "first": [], "last": []}',
        '{"shape": 3, "first": [], "last": [], "hints": [0, 0, 0, 0, 0, 0], "swaps": 0}',
        '{"shape": [3, 2], "first": null, "last": [], "hints": [0, 0, 0, 0, 0, 0], "swaps": 0}',
        '{"shape": [3, 2], "first": [], "last": [], "hints": {}, "swaps": 0}',
        '{"shape": [3, 2], "first": [], "last": [], "hints": ["a"], "swaps": 0}',
        '{"shape": [3, 2], "first": [], "last": [], "hints": [0, 0], "swaps": 0}',
        '{"shape": [3, 2], "first": [77], "last": [], "hints": [0, 0, 0, 0, 0, 0], "swaps": 0}',
        '{"shape": [3, 2], "first": [1, 1], "last": [], "hints": [0, 0, 0, 0, 0, 0], "swaps": 0}',
        '{"shape": [3, 2], "first": [1], "last": [1], "hints": [0, 0, 0, 0, 0, 0], "swaps": 0}',
        '{"shape": [3, 2], "first": ["1"], "last": [], "hints": [0, 0, 0, 0, 0, 0], "swaps": 0}',
        '{"shape": [3, 2], "first": [[1]], "last": [], "hints": [0, 0, 0, 0, 0, 0], "swaps": 0}',
        '{"shape": [3, 2], "first": [], "last": [], "hints": [0, 0, 0, 0, 0, 0], "swaps": 0, "seconds": null}',
        "\xff\xfe",
    ],
)
def test_a_broken_search_json_is_one_line(text: str, make_model: MakeModel, tmp_path: Path) -> None:
    (tmp_path / ORDER).write_bytes(text.encode("latin-1"))
    with (
        subject_of(make_model("llama")) as subject,
        pytest.raises(UserError, match=r"^resume: .*search\.json") as error,
    ):
        searched(subject, tmp_path)
    assert "\n" not in str(error.value)
    assert "delete it to start anew" in str(error.value)


def test_an_order_of_another_model_is_refused(make_model: MakeModel, tmp_path: Path) -> None:
    with subject_of(make_model("llama")) as subject:
        searched(subject, tmp_path)
    state = unsealed(json.loads((tmp_path / ORDER).read_text()))
    assert set(state) == {"shape", "first", "last", "hints", "swaps", "seconds"}
    with (
        subject_of(make_model("llama", num_hidden_layers=2)) as other,
        pytest.raises(UserError, match=r"orders \(3, 2\) heads, this model has \(2, 2\)"),
    ):
        searched(other, tmp_path)


def test_candidates_fill_what_the_device_has(make_model: MakeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    with subject_of(make_model("llama")) as subject:
        assert registry.batch_tokens_for(subject, 0.5) == registry.CPU_BATCH_TOKENS
        monkeypatch.setattr(Subject, "device", torch.device("cuda"))
        for logits, width in ((0.0, 12 * 32 + 4 * 48), (0.25, 12 * 32 + 4 * 48 + 24)):
            free = 3 * width * 4 * 500 + 7  # a third of it, in float32, holds 500 tokens
            monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free, 0))
            assert registry.batch_tokens_for(subject, logits) == 500
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (0, 0))
        assert registry.batch_tokens_for(subject, 1.0) == 1


@pytest.mark.parametrize("asked", [None, 77])
def test_candidates_fill_what_is_asked_for(
    asked: int | None, make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []

    class Watched(MaskLosses):
        def __call__(self, masks: Tensor) -> Tensor:
            seen.append(self.batch_tokens)
            return super().__call__(masks)

    monkeypatch.setattr(registry, "MaskLosses", Watched)
    with subject_of(make_model("llama")) as subject:
        searched(subject, tmp_path, batch_tokens=asked)
    assert set(seen) == {asked or registry.CPU_BATCH_TOKENS}


@pytest.mark.parametrize("name", ["retrieval_score", "query_score"])
def test_samples_that_do_not_hold_their_answers_do_not_count(name: str, make_model: MakeModel) -> None:
    settings = AttentionSettings(name, **WINDOW)
    with subject_of(planted_model(make_model, 1, 0)) as subject:
        held, text = planted_sample(0, answered=True), random_sample(60, 1, scored=20)
        alone = mean_scores(subject, [held], settings, CONSOLE)
        torch.testing.assert_close(mean_scores(subject, [text, held, text], settings, CONSOLE), alone)
        with pytest.raises(UserError, match=f"^method={name} needs samples .*: choose data=passkey"):
            mean_scores(subject, [text], settings, CONSOLE)
