"""The worker that asks the peers, with a press of the tests' own in place of kvpress."""

import errno
import fcntl
import json
import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from duo_id.common.integrity import unsealed
from duo_id.evaluate.judging import peer_rows
from duo_id.evaluate.peers import read_answers
from duo_id.models.loading import byte_tokenizer
from duo_id.peers.choices import PRESSES
from tests.peers.cases import (
    RECENT,
    SINK,
    TOKENS,
    answer_logits,
    cache_bytes,
    greedy,
    kept_tokens,
    make_items,
    measures,
    model_folder,
    write_run,
)
from tests.peers.conftest import ask

ITEMS = make_items()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, PreTrainedModel]:
    folder = tmp_path_factory.mktemp("model")
    return folder, model_folder(folder)


@pytest.fixture
def run(tmp_path: Path, saved: tuple[Path, PreTrainedModel]) -> Path:
    write_run(tmp_path, saved[0], ITEMS)
    return tmp_path


def lines(run: Path, press: str = "knorm") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / f"answers-{press}.jsonl").read_text().splitlines()]


def test_answers_are_those_of_a_plain_forward(
    scripts: SimpleNamespace, run: Path, saved: tuple[Path, PreTrainedModel]
) -> None:
    """The context is read in full, and what comes after it sees what was kept."""
    assert ask(scripts, run, "knorm") == 0
    model, rows = saved[1], read_answers(run, ITEMS)
    assert len(rows) == 2 * 2 * 3
    for row in rows:
        item = ITEMS[row["index"]]
        question = item.questions[row["question"]]
        tokens = TOKENS if question.place is None else question.place - 1
        kept = kept_tokens(row["sparsity"], tokens)
        full = answer_logits(model, item, question)
        logits = answer_logits(model, item, question, (torch.arange(tokens) >= tokens - kept)[None])
        loss, kl, correct = measures(logits, full, question.answer)
        assert row["loss"] == pytest.approx(loss, abs=1e-4)
        assert row["kl"] == pytest.approx(kl, abs=1e-4)
        assert (row["kl"] > 1e-3) == (row["sparsity"] > 0)
        assert (row["correct"], row["tokens"]) == (correct, len(question.answer))
        assert (row["bytes"], row["full_bytes"]) == (cache_bytes(model, kept), cache_bytes(model, tokens))
        assert (row["generated"] is None) == (question.place is not None)
        if row["generated"] and row["sparsity"] == 0:
            assert row["generated"] == greedy(model, [*item.context, *question.prompt], item.max_new_tokens)


def test_layers_may_keep_different_numbers(
    scripts: SimpleNamespace, run: Path, saved: tuple[Path, PreTrainedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No token sees the ones after it, in whichever layer."""
    fewer = [3, 9, 0]

    class UnequalPress(scripts.press):  # type: ignore[misc, name-defined]
        def kept(self, layer: int, entries: int) -> int:
            return super().kept(layer, entries) - fewer[layer]

    monkeypatch.setitem(
        scripts.presses.PEERS, "kvcompose", scripts.presses.Peer(lambda budget: UnequalPress(budget.ratio), "")
    )
    assert ask(scripts, run, "kvcompose") == 0
    model, rows = saved[1], read_answers(run, ITEMS)
    assert len(rows) == 2 * 2 * 3
    for row in rows:
        item = ITEMS[row["index"]]
        question = item.questions[row["question"]]
        tokens = TOKENS if question.place is None else question.place - 1
        kept = kept_tokens(row["sparsity"], tokens)

        def hide(module: Any, given: Any, options: dict[str, Any], tokens: int = tokens, kept: int = kept) -> Any:
            mask = options["attention_mask"].clone()
            mask[:, :, tokens:, : tokens - kept + fewer[module.layer_idx]] = torch.finfo(torch.float32).min
            return given, options | {"attention_mask": mask}

        full = answer_logits(model, item, question)
        hooks = [
            layer.self_attn.register_forward_pre_hook(hide, with_kwargs=True, prepend=True)
            for layer in model.model.layers
        ]
        logits = answer_logits(model, item, question)
        for hook in hooks:
            hook.remove()
        loss, kl, _ = measures(logits, full, question.answer)
        assert row["loss"] == pytest.approx(loss, abs=1e-4)
        assert row["kl"] == pytest.approx(kl, abs=1e-4)
        assert row["bytes"] == cache_bytes(model, kept - sum(fewer) / 3)


def test_turns_follow_what_the_press_has_answered(
    scripts: SimpleNamespace, run: Path, saved: tuple[Path, PreTrainedModel]
) -> None:
    """In full attention's own conversation for the reference; no token that follows the context is evicted."""
    items = [replace(item, questions=item.questions[::2], turns=True) for item in ITEMS]
    write_run(run, saved[0], items)
    assert ask(scripts, run, "knorm", generate=False) == 0
    model, rows = saved[1], read_answers(run, items)
    assert len(rows) == 2 * 2 * 2
    judged = peer_rows(rows, items, byte_tokenizer(), {2, 257})
    for first, second in zip(judged[::2], judged[1::2], strict=True):
        assert (first["turn"], second["turn"], second["bytes"]) == (1, 2, first["bytes"])
    for first, second, last in zip(rows[::2], rows[1::2], judged[1::2], strict=True):
        item, kept = items[second["index"]], kept_tokens(second["sparsity"], TOKENS)
        said = [token for token in first["generated"] if token not in (2, 257)]
        asked = replace(item.questions[1], prompt=(*item.questions[0].prompt, *said, *item.questions[1].prompt))
        logits = answer_logits(model, item, asked, (torch.arange(TOKENS) >= TOKENS - kept)[None])
        loss, _, correct = measures(logits, logits, asked.answer)
        assert (second["loss"], second["correct"]) == (pytest.approx(loss, abs=1e-4), correct)
        if second["sparsity"] == 0:
            assert second["kl"] == pytest.approx(0, abs=1e-4)
            assert second["generated"] == greedy(model, [*item.context, *asked.prompt], item.max_new_tokens)
        answered = sum(token not in (2, 257) for token in second["generated"])
        assert last["total_bytes"] == cache_bytes(model, kept + len(asked.prompt) + answered)


def test_a_share_of_the_cache_is_kept_of_each_context(scripts: SimpleNamespace, run: Path, saved: Any) -> None:
    """Whatever is cached before the question, and never less than the window."""
    write_run(run, saved[0], ITEMS, sparsities=[0.5], shares=[0.5], caches=[0.5, 0.05])
    assert ask(scripts, run, "knorm", generate=False) == 0
    rows = read_answers(run, ITEMS)
    assert {(row["sparsity"], row["cache"]) for row in rows} == {(0.5, None), (None, 0.5), (None, 0.05)}
    for row in rows:
        question = ITEMS[row["index"]].questions[row["question"]]
        tokens = TOKENS if question.place is None else question.place - 1
        window = min(SINK + RECENT, tokens)
        kept = kept_tokens(0.5, tokens) if row["cache"] is None else max(window, int(row["cache"] * tokens))
        assert row["bytes"] == cache_bytes(saved[1], kept)
    written = lines(run)
    assert ask(scripts, run, "knorm", generate=False) == 0
    assert lines(run) == written, "nothing is answered twice"
    assert ask(scripts, run, "tova", generate=False, cache=[0.5]) == 0
    assert {(line["sparsity"], line["cache"]) for line in lines(run, "tova")[1:]} == {(None, 0.5)}


def test_a_run_goes_on_where_it_stopped(
    scripts: SimpleNamespace, run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ask(scripts, run, "knorm", samples=1, sparsity=[0.5], generate=False) == 0
    (header, first), path = lines(run), run / "answers-knorm.jsonl"
    assert (first["index"], first["sparsity"], first["questions"][0]["generated"]) == (0, 0.5, None)
    with open(path, "a") as file:
        file.write('{"task": "words", "leng')  # the process was killed here
    assert ask(scripts, run, "knorm", generate=False) == 0
    assert lines(run)[:2] == [header, first]
    assert [(line["index"], line["sparsity"]) for line in lines(run)[2:]] == [(0, 0.0), (1, 0.0), (1, 0.5)]
    assert ask(scripts, run, "knorm") == 0  # answers that lack a generated one are given anew
    assert [bool(line["questions"][0]["generated"]) for line in lines(run)[1:]] == [False] * 4 + [True] * 4

    monkeypatch.setattr(scripts.run, "load_model", lambda *given: pytest.fail("all is answered"))
    assert ask(scripts, run, "knorm") == 0
    monkeypatch.setattr(scripts.run, "version", lambda package: "1")
    assert ask(scripts, run, "knorm") == 2
    assert "answers-knorm.jsonl was written with another versions" in capsys.readouterr().err


def test_a_press_that_fails_leaves_the_others_alone(
    scripts: SimpleNamespace, run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(budget: Any) -> Any:
        press = scripts.press(budget.ratio)
        if budget.share and budget.tokens == TOKENS:
            press.compression_ratio = None
        return press

    working = scripts.presses.PEERS["tova"]
    monkeypatch.setitem(scripts.presses.PEERS, "tova", scripts.presses.Peer(broken, "is broken"))
    assert ask(scripts, run, "tova", "knorm", generate=False) == 1
    output = capsys.readouterr().out
    assert output.count("tova failed on words at 160: TypeError") == 1
    assert "2 failed" in output
    rows = read_answers(run, ITEMS)
    assert {name: sum(row["heads"] == name for row in rows) for name in ("tova", "knorm")} == {"tova": 6, "knorm": 12}
    note = next(row["note"] for row in rows if row["heads"] == "tova")
    assert "is broken; failed on 2 contexts, first with TypeError" in note

    monkeypatch.setitem(scripts.presses.PEERS, "tova", scripts.presses.Peer(working.make, "is broken"))
    assert ask(scripts, run, "tova", "knorm", generate=False) == 0
    assert len(read_answers(run, ITEMS)) == 24


def test_two_at_once_do_not_answer_into_one_file(
    scripts: SimpleNamespace, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = run / "answers-knorm.jsonl"
    with path.open("ab") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert ask(scripts, run, "knorm") == 2
    assert capsys.readouterr().err == f"error: another process is writing to {path}: wait until it exits\n"
    assert path.read_bytes() == b""
    assert ask(scripts, run, "knorm") == 0


def test_a_full_disk_is_told_and_what_was_answered_stays(
    scripts: SimpleNamespace, run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sync, calls = os.fsync, []

    def full(handle: int) -> None:
        calls.append(handle)
        if len(calls) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        sync(handle)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        assert ask(scripts, run, "knorm") == 2
    (told,) = capsys.readouterr().err.splitlines()
    path = str(run / "answers-knorm.jsonl")
    assert told == f"error: [Errno 28] No space left on device: {path!r}; repeat the command to resume"
    assert len(lines(run)) >= 2
    assert ask(scripts, run, "knorm") == 0


def test_an_interrupt_is_no_failure(scripts: SimpleNamespace, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(budget: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setitem(scripts.presses.PEERS, "knorm", scripts.presses.Peer(interrupt, ""))
    monkeypatch.setattr(scripts.presses.Peer, "settings", lambda self: {})
    assert ask(scripts, run, "knorm") == 130
    assert len(lines(run)) == 1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"cache": [0.3]}, "cache=0.3 is not among those of the samples: []"),
        ({"sparsity": [0.3]}, "sparsity=0.3 is not among those of the samples: [0.0, 0.5]"),
        ({"tasks": ["riddles"]}, "tasks=riddles is not among those of the samples: words"),
        ({"samples": 0}, "raise samples=0"),
        ({"folder": "nowhere"}, "samples.jsonl does not exist"),
    ],
)
def test_mistakes_are_one_line(
    scripts: SimpleNamespace, run: Path, capsys: pytest.CaptureFixture[str], options: dict[str, Any], words: str
) -> None:
    assert ask(scripts, run, "knorm", **options) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert words in error
    assert error.count("\n") == 1


def test_samples_and_models_that_do_not_fit_are_mistakes(
    scripts: SimpleNamespace, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = run / "samples.jsonl"
    first, rest = path.read_text().split("\n", 1)
    path.write_text(json.dumps(unsealed(json.loads(first)) | {"version": 9}) + "\n" + rest)
    assert ask(scripts, run, "knorm") == 2
    assert "is duo_id/samples version 9" in capsys.readouterr().err
    path.write_text("no JSON\n")
    assert ask(scripts, run, "knorm") == 2
    assert "cannot be read" in capsys.readouterr().err
    write_run(run, run / "nothing", ITEMS)
    assert ask(scripts, run, "knorm") == 2
    assert "cannot be loaded on cpu" in capsys.readouterr().err


def test_budgets_are_those_of_a_mask(scripts: SimpleNamespace) -> None:
    budget = scripts.presses.Budget
    assert budget(1000, 0.5, 16, 64).kept == 540
    assert budget(60, 0.5, 16, 64).kept == 60  # a context within the window stays whole
    assert budget(60, 0.5, 16, 64).ratio == 0
    assert budget(1000, 0.0, 16, 64).ratio == 0
    for tokens in range(90, 5000, 7):
        for share in (0.1, 22 / 90, 0.5, 1.0):
            asked = budget(tokens, share, 16, 64)
            assert int(tokens * (1 - asked.ratio)) == asked.kept, "kvpress rounds down"
            assert int(tokens * asked.ratio) in (tokens - asked.kept, tokens - asked.kept - 1), "KVzip counts what goes"


def test_bytes_leave_out_what_is_masked(scripts: SimpleNamespace) -> None:
    states = [SimpleNamespace(keys=torch.zeros(1, 2, 10, 8), values=torch.zeros(1, 2, 10, 6)) for _ in range(2)]
    cache, entry = SimpleNamespace(layers=states), (8 + 6) * 4
    assert scripts.reading.retained_bytes(cache, []) == 40 * entry
    masked = tuple(torch.zeros(7, dtype=torch.int64) for _ in range(3))
    modules = [
        SimpleNamespace(layer_idx=0, masked_key_indices=None),
        SimpleNamespace(layer_idx=1, masked_key_indices=masked),
        SimpleNamespace(),
    ]
    assert scripts.reading.retained_bytes(cache, modules) == 33 * entry


def test_chunks_never_exceed_the_budget(scripts: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """kvpress keeps the whole part of the share of all chunks, the last of which may be shorter."""
    monkeypatch.setattr(scripts.presses, "SnapKVPress", lambda ratio: ratio)
    monkeypatch.setattr(scripts.presses, "ChunkKVPress", lambda ratio, length: (ratio, length))
    for tokens in range(90, 3000, 7):
        for share in (0.0, 0.1, 0.5, 1.0):
            budget = scripts.presses.Budget(tokens, share, 16, 64)
            ratio, length = scripts.presses.PEERS["chunkkv"].make(budget)
            chunks = int(-(-tokens // length) * (1 - ratio))
            kept = chunks * length - (-tokens % length)  # the last one, which may be shorter, among them
            assert budget.kept - length < kept <= budget.kept


def test_what_is_drawn_does_not_depend_on_what_came_before(
    scripts: SimpleNamespace, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn, read = [], scripts.run.read

    def reading(model: Any, context: Any, press: Any, *rest: Any) -> Any:
        if press is not None:
            drawn.append(torch.rand(1).item())
        return read(model, context, press, *rest)

    monkeypatch.setattr(scripts.run, "read", reading)
    assert ask(scripts, run, "leverage", generate=False) == 0
    assert len(drawn) == 8
    assert len(set(drawn)) == 1


def test_what_one_context_masked_is_forgotten(scripts: SimpleNamespace, saved: tuple[Path, PreTrainedModel]) -> None:
    attention = saved[1].model.layers[0].self_attn
    attention.masked_key_indices = tuple(torch.zeros(7, dtype=torch.int64) for _ in range(3))
    held = scripts.reading.read(saved[1], ITEMS[0].context, None, eager=True)
    assert attention.masked_key_indices is None
    assert held.bytes == cache_bytes(saved[1], TOKENS)
    assert saved[1].config._attn_implementation == "sdpa"


def test_generation_ends_at_its_stop(scripts: SimpleNamespace, saved: tuple[Path, PreTrainedModel]) -> None:
    model, item = saved[1], ITEMS[0]
    texts = dict(enumerate([" \n", "a", "b", "\n", "c"], start=10))
    tokens = list(texts)
    tokenizer = SimpleNamespace(eos_token_id=99, decode=lambda written: "".join(texts[token] for token in written))
    queue = list(tokens)

    def forward(*given: Any) -> torch.Tensor:
        return torch.eye(100)[queue.pop(0)][None]

    held = scripts.reading.read(model, item.context, None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scripts.reading, "_forward", forward)

        def answer(first: list[int], count: int, stop: str | None) -> list[int]:
            queue[:] = first
            return scripts.reading.generate(model, tokenizer, held, [5], count, stop)

        assert answer(tokens, 5, "\n") == tokens[:4]
        assert answer(tokens, 5, None) == tokens
        assert answer(tokens, 2, "\n") == tokens[:2]
        assert answer([11, 99, 12], 5, None) == [11, 99]


def test_requirements_hold_the_same_torch() -> None:
    root = Path(__file__).parents[2]
    pins = [set((root / name).read_text().split()) for name in ("constraints.txt", "src/duo_id/peers/requirements.txt")]
    for name in ("torch==", "rich=="):
        (both,) = {pin for pin in pins[0] if pin.startswith(name)}
        assert both in pins[1]


def test_every_press_can_be_chosen(scripts: SimpleNamespace) -> None:
    assert tuple(scripts.presses.PEERS) == PRESSES
