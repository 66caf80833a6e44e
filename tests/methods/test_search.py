"""Searches find the planted head, and can be resumed."""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor
from transformers import PreTrainedModel

from duo_id.common.errors import UserError
from duo_id.common.integrity import DIGEST_PREFIX, SEAL, unsealed
from duo_id.data.samples import Sample
from duo_id.methods import search as module
from duo_id.methods.candidates import MaskLosses
from duo_id.methods.search import SEARCH_FILE, search
from duo_id.methods.settings import SearchSettings
from duo_id.models.gated_model import GatedModel
from duo_id.patterns.pattern import HeadPattern
from tests.methods.conftest import gated_model_of
from tests.step.test_distillation import HYBRID
from tests.support.planted import HEADS, assert_first, planted_model, planted_sample, random_sample

MakeModel = Callable[..., PreTrainedModel]
CONSOLE = Console(file=io.StringIO())
WINDOW: dict[str, Any] = {"sink_size": 3, "recent_size": 8}


def searching(**changes: Any) -> SearchSettings:
    return SearchSettings("search", **({**WINDOW, "batch_tokens": 1000} | changes))


def samples() -> list[Sample]:
    return [random_sample(40, 1), random_sample(31, 2)]


def searched(gated_model: GatedModel, folder: Path, pattern: HeadPattern | None = None, **changes: Any) -> Any:
    result = search(gated_model, samples(), searching(**changes), pattern, folder, CONSOLE)
    return result.scores[[layer.index for layer in gated_model.layers]], result.provenance


@pytest.mark.parametrize(("layer", "kv_head"), HEADS)
@pytest.mark.parametrize(
    ("strategy", "objective"), [("elimination", "kl"), ("selection", "kl"), ("elimination", "hidden_l2")]
)
def test_searches_rank_the_planted_head_first(
    strategy: str, objective: str, layer: int, kv_head: int, make_model: MakeModel, tmp_path: Path
) -> None:
    settings = searching(strategy=strategy, objective=objective)
    with gated_model_of(planted_model(make_model, layer, kv_head)) as gated_model:
        samples = [planted_sample(seed, objective == "kl") for seed in range(3)]
        pattern = search(gated_model, samples, settings, None, tmp_path, CONSOLE)
    scores, provenance = pattern.scores, pattern.provenance
    assert_first(scores, layer, kv_head)
    torch.testing.assert_close(scores.flatten().sort().values, torch.linspace(0, 1, 6))
    assert provenance["samples"] == 3
    assert provenance["forwards"] > 0
    assert "budget" not in provenance


@pytest.mark.parametrize("strategy", ["elimination", "selection"])
def test_a_resumed_search_ends_as_an_undisturbed_one(
    strategy: str, make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped in any round of the search or of the exchanges that follow it."""
    changes: dict[str, Any] = {"strategy": strategy, "swap_at": 0.5, "max_swaps": 1, "swap_width": 3}
    plain, left = MaskLosses.__call__, [0]  # calls until one is interrupted; below 0, none is

    def distorted(self: MaskLosses, masks: Tensor) -> Tensor:
        """Losses that leave something to exchange."""
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt
        closed = (~masks).flatten(1).float()
        together = closed[:, 1] * closed[:, 2] * closed[:, 5] * (closed.sum(1) == 3)
        return plain(self, masks) * 0.01 + closed @ torch.arange(6.0) - 20 * together

    monkeypatch.setattr(MaskLosses, "__call__", distorted)
    with gated_model_of(make_model("llama")) as gated_model:
        (tmp_path / "whole").mkdir()
        expected, provenance = searched(gated_model, tmp_path / "whole", **changes)
        assert (provenance["swaps"], provenance["budget"]) == (1, 0.5)
        for stop_at in range(1, -left[0] + 1):
            folder = tmp_path / str(stop_at)
            folder.mkdir()
            left[0] = stop_at
            with pytest.raises(KeyboardInterrupt):
                searched(gated_model, folder, **changes)
            for _ in range(2):  # a finished search stays as it is
                scores, found = searched(gated_model, folder, **changes)
                assert torch.equal(scores, expected), stop_at
                assert (found["swaps"], found["budget"]) == (1, 0.5), stop_at
            states = [json.loads((path / SEARCH_FILE).read_text()) for path in (folder, tmp_path / "whole")]
            assert all(state.pop("seconds") > 0 for state in states)
            assert all(state.pop(SEAL).startswith(DIGEST_PREFIX) for state in states), "of seconds too, which differ"
            assert states[0] == states[1], stop_at
    assert stop_at > 5


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
    (tmp_path / SEARCH_FILE).write_bytes(text.encode("latin-1"))
    with (
        gated_model_of(make_model("llama")) as gated_model,
        pytest.raises(UserError, match=r"^resume: .*search\.json") as error,
    ):
        searched(gated_model, tmp_path)
    assert "\n" not in str(error.value)
    assert "delete it to start anew" in str(error.value)


def test_a_start_decides_the_heads_outside_and_hybrid_models_use_their_gated_rows(
    make_model: MakeModel, tmp_path: Path
) -> None:
    kv_heads = 2
    start_scores = torch.tensor([[0.1, 0.8], [1.0, 1.0], [0.6, 0.3], [1.0, 1.0]])
    start = HeadPattern(start_scores, 3, 8, gated_layers=(0, 2))
    with gated_model_of(make_model("gemma3_text", **HYBRID)) as gated_model:
        assert gated_model.shape == (2, kv_heads)
        scores, _ = searched(gated_model, tmp_path, start, start="any", between=[0.25, 0.75])
        (tmp_path / "none").mkdir()
        settled, _ = searched(gated_model, tmp_path / "none", start, start="any", between=[0.5, 0.5])
    assert scores.flatten()[0] == 0
    assert scores.flatten()[1] == 1
    assert settled.flatten().argsort().tolist() == [0, 3, 2, 1]


@pytest.mark.parametrize("sparsity", [0.05, 0.95])
def test_a_budget_of_no_head_or_all_is_refused(sparsity: float, make_model: MakeModel, tmp_path: Path) -> None:
    with (
        gated_model_of(make_model("llama")) as gated_model,
        pytest.raises(UserError, match=r"swap_at=.* of 6 heads leaves none"),
    ):
        searched(gated_model, tmp_path, swap_at=sparsity, max_swaps=3)


def test_an_order_of_another_model_is_refused(make_model: MakeModel, tmp_path: Path) -> None:
    with gated_model_of(make_model("llama")) as gated_model:
        searched(gated_model, tmp_path)
    state = unsealed(json.loads((tmp_path / SEARCH_FILE).read_text()))
    assert set(state) == {"shape", "first", "last", "hints", "swaps", "seconds"}
    with (
        gated_model_of(make_model("llama", num_hidden_layers=2)) as other,
        pytest.raises(UserError, match=r"orders \(3, 2\) heads, this model has \(2, 2\)"),
    ):
        searched(other, tmp_path)


def test_candidates_fill_the_free_memory(make_model: MakeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    with gated_model_of(make_model("llama")) as gated_model:
        assert module.fitting_batch_tokens(gated_model) == module.CPU_BATCH_TOKENS
        monkeypatch.setattr(GatedModel, "device", torch.device("cuda"))
        free = 3 * (12 * 32 + 4 * 48) * 4 * 500 + 7  # a third of it, in float32, holds 500 tokens
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 0))
        assert module.fitting_batch_tokens(gated_model) == 500
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (0, 0))
        assert module.fitting_batch_tokens(gated_model) == 1


@pytest.mark.parametrize("batch_tokens", [None, 77])
def test_batch_tokens_can_be_set(
    batch_tokens: int | None, make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    used: list[int] = []

    class Watched(MaskLosses):
        def __call__(self, masks: Tensor) -> Tensor:
            used.append(self.batch_tokens)
            return super().__call__(masks)

    monkeypatch.setattr(module, "MaskLosses", Watched)
    with gated_model_of(make_model("llama")) as gated_model:
        searched(gated_model, tmp_path, batch_tokens=batch_tokens)
    assert set(used) == {batch_tokens or module.CPU_BATCH_TOKENS}
