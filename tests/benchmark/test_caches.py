"""Rows of each task, and rows that ran out of memory."""

from typing import Any

import pytest
import torch

from duo_id.benchmark import caches
from duo_id.benchmark.contenders import DualAttention, StaticAttention
from duo_id.step.compiled import compiled_parts
from tests.benchmark.cases import layers_of, make_bench, mask, named
from tests.support.tiny import tiny_model


def rows_of(kind: type, **changes: Any) -> list[dict[str, Any]]:
    model = tiny_model("llama")
    bench = make_bench(model, **changes)
    batch = bench.settings.batch_size
    extra = (mask(),) if kind is DualAttention else ()
    return list(bench.rows(kind(named(model), layers_of(model), batch, *extra)))


@pytest.mark.parametrize("kind", [StaticAttention, DualAttention])
def test_a_decode_row_holds_times_bytes_and_the_floor(kind: type) -> None:
    rows = rows_of(kind, batch_size=2)
    assert sorted(row["context"] for row in rows) == [20, 50]
    for row in rows:
        assert row["status"] == "ok"
        assert 0 < row["ms_min"] <= row["ms"] <= row["ms_max"]
        assert row["tokens_per_s"] == pytest.approx(2 / row["ms"] * 1e3)
        assert row["over_floor"] == pytest.approx(row["ms"] / row["floor_ms"])
        assert row["floor_ms"] == pytest.approx(1e3 * max(row["floor_bytes"] / 1e9, row["floor_flops"] / 1e10))
        slots = 6 * (row["context"] + 1) if kind is StaticAttention else 3 * (row["context"] + 1) + 3 * 12
        assert row["cache_bytes"] == 2 * 2 * 4 * 16 * slots, "the cache of this row's context"
        assert row["peak_bytes"] is None
        assert row["seconds"].keys() >= {"fill", "capture", "measure"}


def test_prefill_rows_are_of_every_context_and_chunk() -> None:
    rows = rows_of(DualAttention, task="prefill", chunk_size=[8, 64])
    assert [(row["context"], row["chunk_size"]) for row in rows] == [(20, 8), (20, 64), (50, 8), (50, 64)]
    for row in rows:
        assert row["tokens_per_s"] == pytest.approx(row["context"] / row["ms"] * 1e3)
        assert row["cache_bytes"] == 2 * 4 * 16 * (3 * row["context"] + 3 * 12)


def test_the_task_memory_measures_no_time() -> None:
    for row in rows_of(StaticAttention, task="memory"):
        assert row["status"] == "ok"
        assert row["cache_bytes"]
        assert "ms" not in row


def test_contexts_shorter_than_the_window_work() -> None:
    assert [row["status"] for row in rows_of(DualAttention, context=[3, 5])] == ["ok", "ok"]


def fails_beyond(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = caches.decode_step

    def instead(contender, forward, cache, context, ids):
        if context > limit:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 TiB.")
        return plain(contender, forward, cache, context, ids)

    monkeypatch.setattr(caches, "decode_step", instead)


@pytest.mark.parametrize("task", ["decode", "memory"])
def test_out_of_memory_is_a_row_and_the_rest_goes_on(task: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fails_beyond(30, monkeypatch)
    rows = {row["context"]: row for row in rows_of(DualAttention, task=task)}
    assert rows[50]["status"] == "OOM"
    assert rows[50]["peak_bytes"] is None
    assert "ms" not in rows[50]
    assert rows[20]["status"] == "ok"
    assert ("floor_ms" in rows[50]) == (task == "decode")


def test_memory_that_runs_out_while_timing_leaves_the_shorter_contexts(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = caches.capture_graph
    calls = [0]

    def instead(step, device):
        calls[0] += 1
        if calls[0] == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return plain(step, device)

    monkeypatch.setattr(caches, "capture_graph", instead)
    rows = {row["context"]: row["status"] for row in rows_of(StaticAttention)}
    assert rows == {50: "OOM", 20: "ok"}


def test_a_prefill_that_does_not_fit_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = caches.read_in_chunks

    def instead(model, ids, cache, chunk_size):
        if chunk_size > 8:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return plain(model, ids, cache, chunk_size)

    monkeypatch.setattr(caches, "read_in_chunks", instead)
    rows = rows_of(StaticAttention, task="prefill", context=[20], chunk_size=[8, 16])
    assert [row["status"] for row in rows] == ["ok", "OOM"]


def test_every_phase_is_announced_with_its_subject() -> None:
    announced: list[str] = []
    model = tiny_model("llama")
    bench = make_bench(model, announced.append, context=[20])
    list(bench.rows(DualAttention(named(model), layers_of(model), 1, mask())))
    assert announced[0] == "duo, 50% stream, 20 tokens: memory"
    assert announced[-1] == "duo, 50% stream, 20 tokens: measure"


def test_norms_and_mlps_are_compiled_and_released_again() -> None:
    model = tiny_model("llama")
    with compiled_parts(model, layers_of(model)):
        compiled = {name for name, module in model.named_modules() if "forward" in module.__dict__}
    block = ("mlp", "input_layernorm", "post_attention_layernorm")
    assert compiled == {f"model.layers.{index}.{module}" for index in range(3) for module in block}
    assert all("forward" not in module.__dict__ for module in model.modules())


@pytest.mark.slow
@pytest.mark.parametrize("task", ["decode", "prefill"])
@pytest.mark.parametrize("kind", [StaticAttention, DualAttention])
def test_compiled_runs_give_rows_too(kind: type, task: str) -> None:
    assert {row["status"] for row in rows_of(kind, task=task, compile=True)} == {"ok"}
