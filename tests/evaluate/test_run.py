"""The evaluate command end to end on tiny random weights: its output, how it resumes, what it refuses."""

import json
import re
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from duo_id.evaluate import runner
from duo_id.evaluate.journal import JOURNAL
from duo_id.evaluate.run import heads_name
from duo_id.patterns.pattern import HeadPattern
from duo_id.patterns.saved import save_pattern
from tests.support.commands import Finished, run_command

PATTERN = HeadPattern(torch.tensor([[0.1, 0.9], [0.3, 0.2], [0.8, 0.4]]), sink_size=4, recent_size=60)
NAME = "pattern/found"
SMALL = [
    "model=tiny",
    "evaluation=quick",
    "tasks=[needle-words,language]",
    "lengths=[1500]",
    "depths=2",
    "samples=1",
    "sparsity=[0.5]",
    "random_masks=2",
    "baselines=[streaming]",
]


def evaluate(folder: Path, *overrides: str, figures: bool = False) -> Finished:
    save_pattern(PATTERN, folder / "pattern" / "found")
    heads = [] if any(override.startswith("heads=") for override in overrides) else [f"heads={folder}/{NAME}"]
    return run_command("evaluate", *heads, *SMALL, *overrides, folder=folder, figures=figures)


def results(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "results.json").read_text())


def keys(rows: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
    return [(row["task"], row["index"], row["question"], row["heads"], row["sparsity"], row["seed"]) for row in rows]


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Finished]:
    """A finished run's folder, and what it printed."""
    folder = tmp_path_factory.mktemp("evaluate")
    finished = evaluate(folder, "write=6", figures=True)
    assert finished.status == 0, finished.output
    return folder / "run", finished


def test_what_contenders_write_is_compared_with_full_attention(finished_run: tuple[Path, Finished]) -> None:
    """Once a context, and not where its answers are inside it; resumed runs write as much."""
    folder, finished = finished_run
    rows = [row for row in results(folder)["rows"] if row.get("written") is not None]
    assert len(rows) == 6, "one needle context, six contenders"
    assert {(row["task"], row["question"]) for row in rows} == {("needle-words", 0)}
    for row in rows:
        assert 0 <= row["agreed"] <= min(row["written"], row["full_written"]) <= 6
        assert row["agreed"] <= row["along_correct"] <= row["full_written"]
    (full,) = (row for row in rows if row["heads"] == "full")
    assert full["agreed"] == full["along_correct"] == full["written"] == full["full_written"]
    assert full["along_kl"] == full["own_kl"] == 0
    others = [row for row in rows if row["heads"] != "full"]
    assert all(row["along_kl"] > 0 and row["own_kl"] > 0 for row in others)
    (table,) = re.findall(r"^What they write.*?Intervals", finished.output, re.MULTILINE | re.DOTALL)
    assert "KL on" in table
    assert max(map(len, table.splitlines())) <= 80
    again = evaluate(folder.parent, f"resume={folder}", "write=7")
    assert "was made with another write (write=6, not 7)" in again.output


def test_conversations_have_a_table_and_go_on(tmp_path: Path) -> None:
    tasks = ["tasks=[turns-json]", "lengths=[3000]", "random_masks=0", "baselines=[]"]
    finished = evaluate(tmp_path, *tasks)
    assert finished.status == 0, finished.output
    assert "By turn of a conversation" in finished.output
    rows = results(tmp_path / "run")["rows"]
    assert [row["turn"] for row in rows] == [1, 2, 3, 4, 5, 6] * 2
    assert all(row["total_bytes"] > row["bytes"] for row in rows if row["kind"] == "full")
    resumed = run_command("evaluate", f"resume={tmp_path / 'run'}", "sparsity=[0.5,1]", folder=tmp_path)
    assert resumed.status == 0, resumed.output
    later = results(tmp_path / "run")["rows"]
    assert later[: len(rows)] == rows
    assert len(later) == 3 * len(rows) / 2


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["write=101", "model.architecture.max_position_embeddings=1600"],
            "write=101: after 1500 tokens the model's limit of 1600 leaves no room: lower lengths or write",
        ),
        (["write=1", "tasks=[language]"], "write=1: all answers of language are inside the context"),
    ],
    ids=["limit", "inside"],
)
def test_where_nothing_can_be_written_is_refused(overrides: list[str], message: str, tmp_path: Path) -> None:
    assert message in evaluate(tmp_path, *overrides).output


def test_a_run_leaves_a_table_results_and_figures(finished_run: tuple[Path, Finished]) -> None:
    folder, finished = finished_run
    saved = results(folder)
    rows = saved["rows"]
    assert len(set(keys(rows))) == len(rows) == (2 + 8) * 6, "two needles and eight blocks; six contenders"
    assert {row["heads"] for row in rows} == {"full", NAME, "random", "streaming"}
    assert pd.read_parquet(folder / "results.parquet")["loss"].tolist() == [row["loss"] for row in rows]
    assert saved["model"]["source"] == "random"
    assert saved["settings"]["lengths"] == [1500]
    assert len(saved["settings"]["data"]["haystack"]["sha256"]) == 64
    assert saved["text_reads"] == 0.01, "of half a library of 1.2 MB"
    assert saved["versions"]["torch"] == torch.__version__
    assert saved["patterns"][NAME]["scores"][0][1] == pytest.approx(0.9)
    first = finished.output.splitlines()[0]
    assert first.startswith(f"tiny on cpu: 3 layers x 2 KV heads, heads of {NAME}, 1 x 1,500 tokens of ")
    assert str(folder) in first
    assert "full" in finished.output
    assert sorted((folder / "figures").glob("*.png"))
    for row in rows:
        assert row["kl"] == 0 if row["heads"] == "full" else row["kl"] >= 0
        assert (row["text"] is None) == (row["task"] == "language")
    assert sum(row["kl"] for row in rows) > 0
    at_half = {row["heads"]: row["bytes"] for row in rows if row["sparsity"] == 0.5 and row["task"] == "language"}
    assert at_half[NAME] == at_half["random"] == pytest.approx(at_half["streaming"], rel=0.005)


@pytest.mark.parametrize(
    ("folder", "method", "name"),
    [
        ("outputs/train/2026-11-24/03-23-49", {"name": "nested"}, "nested"),
        ("outputs/train/2026-11-24/03-23-49", None, "2026-11-24/03-23-49"),
        ("outputs/train/2026-11-24/03-23-49", {"name": "random"}, "2026-11-24/03-23-49"),
        ("runs/mine", {"name": "nested"}, "runs/mine"),
    ],
)
def test_rows_are_called_after_the_method_rather_than_the_date(
    folder: str, method: dict[str, str] | None, name: str, tmp_path: Path
) -> None:
    provenance = {"settings": {"method": method}} if method else {}
    save_pattern(replace(PATTERN, provenance=provenance), tmp_path / folder / "heads")
    assert heads_name(str(tmp_path / folder)) == name


def test_the_run_is_reproducible(finished_run: tuple[Path, Finished], tmp_path: Path) -> None:
    assert evaluate(tmp_path, "generate=false").status == 0
    repeated = results(tmp_path / "run")["rows"]
    assert keys(repeated) == keys(results(finished_run[0])["rows"])
    assert [row["loss"] for row in repeated] == [row["loss"] for row in results(finished_run[0])["rows"]]


@pytest.mark.parametrize(
    ("number", "overrides"), [(signal.SIGINT, []), (signal.SIGTERM, ["generate=false"])], ids=["SIGINT", "SIGTERM"]
)
def test_an_interrupted_run_goes_on(
    number: int,
    overrides: list[str],
    finished_run: tuple[Path, Finished],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plain, calls = runner.score_rows, []

    def interrupted(*args: Any, **kwargs: Any) -> list[dict[str, Any]]:
        calls.append(args[0].heads)
        if len(calls) == 4:
            signal.raise_signal(number)
        return plain(*args, **kwargs)

    monkeypatch.setattr(runner, "score_rows", interrupted)
    stopped = evaluate(tmp_path, *overrides)
    assert stopped.status == 128 + number
    assert f"python -m duo_id.evaluate resume={tmp_path / 'run'}" in stopped.output
    lines = (tmp_path / "run" / JOURNAL).read_text().splitlines()
    assert len(lines) > 1, "scores persist"
    calls.clear()
    monkeypatch.setattr(runner, "score_rows", lambda *args, **kw: calls.append(args[0].heads) or plain(*args, **kw))
    finished = run_command("evaluate", f"resume={tmp_path / 'run'}", folder=tmp_path)
    assert finished.status == 0, finished.output
    assert len(calls) == 12 - 3, "nothing is scored twice"
    rows, expected = results(tmp_path / "run")["rows"], results(finished_run[0])["rows"]
    assert sorted(map(str, keys(rows))) == sorted(map(str, keys(expected)))
    losses = {key: row["loss"] for key, row in zip(keys(expected), expected, strict=True)}
    assert all(row["loss"] == pytest.approx(losses[key]) for key, row in zip(keys(rows), rows, strict=True))


def test_more_samples_and_contenders_are_appended(tmp_path: Path) -> None:
    assert evaluate(tmp_path, "generate=false", "random_masks=0", "depths=1").status == 0
    first = results(tmp_path / "run")["rows"]
    assert all(row["text"] is None for row in first)
    overrides = ["samples=2", "random_masks=1", "generate=true"]
    finished = run_command("evaluate", f"resume={tmp_path / 'run'}", *overrides, folder=tmp_path)
    assert finished.status == 0, finished.output
    rows = results(tmp_path / "run")["rows"]
    assert len(rows) == 2 * 9 * 5
    assert keys(rows)[: len(first)] == keys(first)
    assert all(row["text"] is not None for row in rows if row["task"] == "needle-words")


def test_several_seeds_are_one_contender(tmp_path: Path) -> None:
    for seed in range(2):
        scores = torch.rand(3, 2, generator=torch.Generator().manual_seed(seed))
        provenance = {"seed": seed, "seconds": 1.0 + seed, "settings": {"data": {"task": "passkey"}}}
        save_pattern(HeadPattern(scores, 4, 60, provenance=provenance), tmp_path / "two" / f"seed-{seed}" / "heads")
    finished = evaluate(tmp_path, f"+patterns.two={tmp_path}/two/seed-*", "generate=false", "random_masks=0")
    assert finished.status == 0, finished.output
    output = " ".join(finished.output.split())
    assert "Rise in answer loss over full attention (nats per token), out of family: language" in output
    assert "two (2 seeds)" in output
    saved = results(tmp_path / "run")
    assert {row["heads"] for row in saved["rows"]} == {"full", NAME, "two#0", "two#1", "streaming"}
    assert saved["patterns"]["two#1"]["provenance"]["seconds"] == 2.0


def test_resuming_with_other_settings_is_refused(finished_run: tuple[Path, Finished], tmp_path: Path) -> None:
    finished = run_command("evaluate", f"resume={finished_run[0]}", "seed=3", folder=tmp_path)
    assert "another seed" in finished.error
    assert "leave out resume" in finished.error


def test_resuming_on_another_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("One sentence after another, and all of them are about nothing. " * 500)
    text = ["data/haystack=file", f"data.haystack.path={tmp_path}/mine.txt", "tasks=[needle-words]"]
    assert evaluate(tmp_path, *text, "random_masks=0", "generate=false").status == 0
    requeued = run_command("evaluate", f"resume={tmp_path / 'run'}", "data.haystack.sha256=null", folder=tmp_path)
    assert requeued.status == 0, requeued.output
    (tmp_path / "mine.txt").write_text("One sentence after another, and none of them is about nothing. " * 500)
    refused = run_command("evaluate", f"resume={tmp_path / 'run'}", "samples=2", folder=tmp_path)
    assert "the text of data.haystack.source=file has the digest" in refused.error
    refused = run_command("evaluate", f"resume={tmp_path / 'run'}", "data.haystack.sha256=null", folder=tmp_path)
    assert "was made with another data (data.haystack.sha256=" in refused.error


REFUSED = {
    "unknown-task": (["tasks=[nosuch]"], "needle-words"),
    "too-long": (["lengths=[5000]"], "4096"),
    "too-short": (["lengths=[200]"], "lengths"),
    "no-text-beyond-the-window": (["lengths=[1500]", "heads=wide"], "raise lengths"),
    "no-chat-template": (["chat_template=true"], "chat_template=false"),
    "no-benchmark-data": (["tasks=[ruler-data]", "data.path=nosuch"], "nosuch"),
    "longbench": (["tasks=[short,longbench/qasper]"], "python -m duo_id.lm_eval --model duo_id --model_args heads=RUN"),
    "unknown-heads": (["heads=nosuch"], "nosuch"),
    "malformed-heads": (["heads=malformed.tsv"], "malformed.tsv, line 2, column 2: 'six'"),
    "heads-of-another-model": (["heads=good.tsv"], "2 layers x 2 KV heads, but tiny has 3 layers"),
    "other-pattern-of-another-model": (["+patterns.other=good.tsv"], "2 layers x 2 KV heads, but tiny has 3 layers"),
    "which-pattern-does-not-fit": (["+patterns.other=good.tsv"], "patterns.other=good.tsv"),
    "no-seeds": (["+patterns.other=nosuch/seed-*"], "patterns.other=nosuch/seed-*: nothing matches"),
    "a-seed-of-another-model": (["+patterns.other=goo*.tsv"], "patterns.other#0=good.tsv"),
    "the-name-of-the-heads": (["heads=wide", "+patterns.wide=good.tsv"], "patterns.wide"),
    "name-with-a-meaning": (["+patterns.random=good.tsv"], "patterns.random"),
    "unknown-split": (["split=train"], "development"),
    "unknown-baseline": (["baselines=[nosuch]"], "streaming"),
    "no-length": (["lengths=[]"], "lengths=[]"),
    "no-samples": (["samples=0"], "samples=0"),
    "bad-sparsity": (["sparsity=[1.5]"], "sparsity=1.5"),
    "text-for-training": (["data/haystack=file"], "data.haystack.path=FILE"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_refused_in_one_line(case: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"sink_size": 4, "recent_size": 60}')
    (tmp_path / "good.tsv").write_text("0.1\t0.2\n0.3\t0.4\n")
    (tmp_path / "malformed.tsv").write_text("0.1\t0.2\n0.3\tsix\n")
    save_pattern(HeadPattern(PATTERN.scores, 64, 4000), tmp_path / "wide")
    overrides, named = REFUSED[case]
    assert named in evaluate(tmp_path, *overrides).error
    assert not list(tmp_path.glob("*/results.json"))
