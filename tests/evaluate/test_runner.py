"""From samples to scores, with a model that is perfect by construction and can be made short-sighted."""

from collections.abc import Iterator
from contextlib import contextmanager
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor

from duo_id.common.errors import UserError
from duo_id.data import chat
from duo_id.data.haystack import load_haystack
from duo_id.data.settings import HaystackSettings
from duo_id.deploy.chunks import Continuation
from duo_id.evaluate import reading, runner
from duo_id.evaluate.contenders import contenders
from duo_id.evaluate.journal import Journal
from duo_id.evaluate.runner import CPU_CONTEXT_TOKENS, context_tokens_for, run
from duo_id.evaluate.tasks.building import SampleBuilder
from duo_id.evaluate.tasks.registry import make_items
from duo_id.models.loading import byte_tokenizer
from duo_id.patterns.mask import HeadMask
from duo_id.patterns.pattern import HeadPattern

PATTERN = HeadPattern(torch.tensor([[0.1, 0.9]]), sink_size=4, recent_size=60)
TASKS = ["needle-words", "needle-numbers", "needle-sentences", "passkeys", "ruler-single", "ruler-multikey"]
TASKS += ["json-lookup", "copying"]
TURNS = ["turns-words", "turns-numbers", "turns-json", "turns-mixed"]


class Recalled:
    """In place of a cache: the tokens of each sample."""

    max_length = None

    def __init__(self, rows: list[str], size: int | None) -> None:
        self.rows, self.size = rows, size

    @property
    def retained_bytes(self) -> int:
        return self.bytes_of(len(self.rows[0]))

    def bytes_of(self, tokens: int) -> int:
        return min(tokens, self.size or tokens)

    def fork(self, samples: Tensor, max_length: int | None = None) -> "Recalled":
        return Recalled([self.rows[row] for row in samples.tolist()], self.size)


class InductionModel:
    """Continues the text as after the last occurrence of its longest repeated suffix: the job of retrieval heads.

    Under a mask with streaming heads it only sees the sink and the latest tokens.
    """

    device = torch.device("cpu")
    dtype = torch.float32
    generation_config = None
    config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(vocab_size=258))
    mask: HeadMask

    def forward(
        self, ids: Tensor, past_key_values: Recalled, use_cache: bool, logits_to_keep: Tensor | None = None
    ) -> Any:
        keep = range(ids.shape[1]) if logits_to_keep is None else logits_to_keep.tolist()
        logits = torch.zeros(len(ids), len(keep), 258)
        for row, tokens in enumerate(ids.tolist()):
            before = past_key_values.rows[row]
            text = before + "".join(map(chr, tokens))
            for index, position in enumerate(keep):
                logits[row, index, self.next(text[: len(before) + position + 1])] = 20.0
            past_key_values.rows[row] = text
        return SimpleNamespace(logits=logits)

    __call__ = forward

    def next(self, text: str) -> int:
        if not self.mask.retrieval.all():
            text = text[:4] + text[-60:]
        for size in range(64, 3, -1):
            start = text.rfind(text[-size:], 0, len(text) - 1)
            if size < len(text) and start >= 0:
                return ord(text[start + size])
        return 0

    def new_cache(self) -> Recalled:
        return Recalled([], None if self.mask.retrieval.all() else 64)


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> Any:
    perfect = InductionModel()

    @contextmanager
    def under(model: InductionModel, mask: HeadMask, kv: str = "exact") -> Iterator[None]:
        assert kv == "exact"
        model.mask = mask
        yield

    def empty(model: InductionModel) -> Any:
        cache = model.new_cache()
        cache.rows, cache.kv = _Rows(), "exact"
        return cache

    monkeypatch.setattr(runner, "duo_attention", under)
    monkeypatch.setattr(reading, "dual_cache", empty)
    for module in (reading, runner):  # it has no logits to compare
        monkeypatch.setattr(module, "continuation", lambda model, ids: Continuation())
    return SimpleNamespace(model=perfect, tokenizer=byte_tokenizer(), keeps_logits=True)


class _Rows(dict[int, str]):
    """The requested number of empty texts."""

    def __missing__(self, row: int) -> str:
        return ""


@pytest.mark.parametrize("batch_tokens", [None, 1])
def test_a_perfect_model_scores_everything_and_one_that_cannot_look_back_nothing(
    model: Any, batch_tokens: int | None, tmp_path: Path
) -> None:
    haystack = load_haystack(HaystackSettings(source="library"), "test")
    builder = SampleBuilder(model.tokenizer, haystack, "test", chat.plain(model.tokenizer))
    items = make_items(TASKS, builder, [2600], 1, 0, None, 3) + make_items(TURNS, builder, [4200], 1, 0, None, 3)
    lineup = contenders({"found": PATTERN}, [1.0], 0, [], 0)
    journal = Journal(tmp_path, {})
    run(model, items, lineup, journal, True, batch_tokens, 700, Console(quiet=True))
    rows = journal.rows
    assert {row["task"] for row in rows} == {*TASKS, *TURNS}
    for row in rows:
        assert row["turn"] == (row["question"] + 1 if row["task"] in TURNS else None)
        context = row["length"] - 4 * (480 if row["turn"] else 96)
        assert row["bytes"] == (64 if row["kind"] == "pattern" else context)
        assert row["total_bytes"] == 64 if row["kind"] == "pattern" else context < row["total_bytes"] <= row["length"]
        if row["kind"] == "full":
            assert row["exact"], row
            assert (row["score"], row["correct"], row["kl"]) == (1, row["tokens"], 0)
            assert row["loss"] < 1e-3
        else:
            assert row["score"] == 0, row
            assert row["correct"] < row["tokens"]
            assert row["kl"] > 1
            assert row["loss"] > 1


def test_the_first_samples_of_all_tasks_and_lengths_come_first(model: Any, tmp_path: Path) -> None:
    haystack = load_haystack(HaystackSettings(source="library"), "test")
    builder = SampleBuilder(model.tokenizer, haystack, "test", chat.plain(model.tokenizer))
    items = make_items(["passkeys", "ruler-single"], builder, [2600, 2700], 2, 0, None, 3)
    lineup = contenders({"found": PATTERN}, [1.0], 0, [], 0)
    journal = Journal(tmp_path, {})
    run(model, items, lineup, journal, False, 1, 700, Console(quiet=True))
    order = [row["index"] for row in journal.rows]
    assert order == sorted(order)
    first = {(row["task"], row["length"]) for row in journal.rows if row["index"] == 0}
    assert len(first) == 4


def test_a_batch_that_does_not_fit_names_the_override(
    model: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def full(*args: Any, **options: Any) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(reading.Reader, "read", full)
    haystack = load_haystack(HaystackSettings(source="library"), "test")
    builder = SampleBuilder(model.tokenizer, haystack, "test", chat.plain(model.tokenizer))
    items = make_items(["passkeys"], builder, [2600], 2, 0, None, 3)
    lineup = contenders({"found": PATTERN}, [1.0], 0, [], 0)
    with pytest.raises(UserError, match="lower batch_tokens=5200"):
        run(model, items, lineup, Journal(tmp_path, {}), True, 5200, 700, Console(quiet=True))


def test_contexts_that_are_not_read_in_chunks_are_said_to_be_so_once(
    model: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for module in (reading, runner):
        monkeypatch.setattr(module, "continuation", lambda model, ids: Continuation(stepwise=True))
    model.name = "odd"
    haystack = load_haystack(HaystackSettings(source="library"), "test")
    builder = SampleBuilder(model.tokenizer, haystack, "test", chat.plain(model.tokenizer))
    items = make_items(["passkeys"], builder, [2600, 2700], 1, 0, None, 3)
    lineup = contenders({"found": PATTERN}, [1.0], 0, [], 0)
    output = StringIO()
    journal = Journal(tmp_path, {})
    run(model, items, lineup, journal, True, 1, 700, Console(file=output))
    assert output.getvalue().count("odd loses its state") == 1
    assert "chunk_size=700" in output.getvalue()
    assert {row["score"] for row in journal.rows if row["kind"] == "full"} == {1}


def test_the_cpu_reads_little_at_a_time(model: Any) -> None:
    assert context_tokens_for(model) == CPU_CONTEXT_TOKENS
