"""A head pattern of kvpress's scores, with scores of the tests' own in place of kvpress."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import PreTrainedModel

from duo_id.patterns.saved import load_pattern
from tests.peers.cases import RECENT, SINK, make_items, model_folder, write_run
from tests.peers.conftest import ask

SCORES = torch.rand(2, 2, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    model_folder(tmp_path / "model")
    write_run(tmp_path, tmp_path / "model", make_items())
    return tmp_path


def test_the_scores_are_a_head_pattern(
    scripts: SimpleNamespace, run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def scores(model: PreTrainedModel) -> list[list[float]]:
        assert model.name_or_path == str(run / "model")
        assert model.dtype == torch.float32
        return SCORES.tolist()

    monkeypatch.setattr(scripts.heads, "head_scores", scores)
    assert ask(scripts, run, heads=True) == 0
    folder = Path(capsys.readouterr().out.removeprefix("heads: ").strip())
    assert folder == run / "heads-duo-on-the-fly"
    pattern = load_pattern(folder)
    assert torch.equal(pattern.scores, SCORES)
    assert (pattern.sink_size, pattern.recent_size) == (SINK, RECENT)
    assert pattern.provenance["config"]["scores"] == "duo_attention_on_the_fly of kvpress 0, float32"


def test_mistakes_are_one_line(
    scripts: SimpleNamespace, run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def scores(model: PreTrainedModel) -> list[list[float]]:
        raise AttributeError("no\nrotary_emb")

    monkeypatch.setattr(scripts.heads, "head_scores", scores)
    for folder, words in (
        (run / "nowhere", "samples.jsonl does not exist"),
        (run, f"kvpress cannot score the heads of {run / 'model'}: no rotary_emb"),
    ):
        assert ask(scripts, folder, heads=True) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert words in error
        assert error.count("\n") == 1
    assert not (run / "heads-duo-on-the-fly").exists()
