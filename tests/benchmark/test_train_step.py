"""The benchmark of training steps end to end on a tiny model, and its floor by hand."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from duo_id.attention.blends import BLENDS
from duo_id.benchmark import run as benchmark
from duo_id.benchmark.ceilings import Ceilings
from duo_id.benchmark.settings import BenchmarkSettings
from duo_id.benchmark.train_step import StepBench
from duo_id.common.errors import UserError
from duo_id.distributed.launch import check_ranks
from duo_id.distributed.ranks import Ranks
from duo_id.models.loading import meta_model
from duo_id.models.settings import ModelSettings
from duo_id.step.devices import calculated_costs, fit_memory
from duo_id.step.distillation import Batch, Distillation, Teacher
from tests.benchmark.cases import layers_of, named
from tests.support.commands import run_command, settings_of
from tests.support.tiny import tiny_model

SMALL = ["task=train_step", "model=tiny", "sink_size=4", "recent_size=8", "repeats=2"]


def saved(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "run" / "results.json").read_text())


def bench(**changes: Any) -> StepBench:
    sizes = {"task": "train_step", "context": [100], "chunk_size": [8], "sparsity": [0.5], "repeats": 1, "warmup": 0}
    values = {
        "model": ModelSettings("tiny"),
        "sink_size": 4,
        "recent_size": 8,
        "blend": ["student"],
        **sizes,
        **changes,
    }
    return StepBench(
        BenchmarkSettings(**values), named(tiny_model("llama")), Ceilings(1.0, 1e6), Path(), lambda _: None
    )


def test_both_steps_are_measured_side_by_side(tmp_path: Path) -> None:
    overrides = ["data.length=60", "blend=[student,teacher]", "profile=true"]
    finished = run_command("benchmark", *SMALL, *overrides, folder=tmp_path, figures=True)
    assert finished.status == 0, finished.output
    rows = saved(tmp_path)["rows"]
    assert [(row["step"], row["blend"]) for row in rows] == [
        (step, blend) for blend in ("student", "teacher") for step in ("ours", "paper")
    ]
    for row in rows:
        assert row["status"] == "ok"
        assert row["context"] == 60
        assert row["ms_min"] <= row["ms"] <= row["ms_max"]
        assert row["tokens_per_s"] == pytest.approx(60 / row["ms"] * 1e3)
        assert row["over_floor"] == pytest.approx(row["ms"] / row["floor_ms"])
        assert 0 < row["mfu"] < 1
        assert {"full attention", "matrix products", "elementwise"} <= row["profile"].keys()
        trace = tmp_path / "run" / f"trace_{row['step']}_{row['blend']}_60.json"
        assert json.loads(trace.read_text())["traceEvents"]
    for word in ("published shape", "where the time goes", "floor"):
        assert word in finished.output
    with Image.open(tmp_path / "run" / "train_step.png") as image:
        assert image.width > 200


def test_the_first_step_may_be_shorter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It compiles, and only what follows is of the length that is measured."""
    lengths: list[int] = []
    plain = Distillation.loss

    def noting(self: Distillation, alpha: torch.Tensor, batch: Batch, teacher: Teacher | None = None) -> torch.Tensor:
        lengths.append(batch["input_ids"].shape[1])
        return plain(self, alpha, batch, teacher)

    monkeypatch.setattr(Distillation, "loss", noting)
    overrides = [*SMALL, "context=60", "first_context=20", "warmup=0", "beside=false"]
    assert run_command("benchmark", *overrides, folder=tmp_path).status == 0
    assert lengths == [20, 60, 60]
    assert saved(tmp_path)["rows"][0]["context"] == 60


def test_a_budget_shows_its_plan(tmp_path: Path) -> None:
    finished = run_command("benchmark", *SMALL, "context=60", "step.memory=1GiB", folder=tmp_path)
    assert finished.status == 0, finished.output
    ours, paper = saved(tmp_path)["rows"]
    assert ours["plan"].startswith("memory of a device with 60 tokens: weights")
    assert paper["plan"] is None
    assert "keep 3 everything" in " ".join(finished.output.split())


def test_the_published_shape_can_be_measured_alone(tmp_path: Path) -> None:
    finished = run_command("benchmark", *SMALL, "context=40", "step=paper_shape", folder=tmp_path)
    assert finished.status == 0, finished.output
    assert [row["step"] for row in saved(tmp_path)["rows"]] == ["paper"]


@pytest.mark.parametrize(("blend", "forwards", "backwards"), [("student", 2, 1), ("detached", 2, 0), ("teacher", 1, 0)])
def test_the_floor_by_hand(blend: str, forwards: int, backwards: int) -> None:
    layers = layers_of(tiny_model("llama"))
    seconds, flops = bench().floor(layers, blend, 100, (0.1, 0.2))
    # Of all layers but the last of 3: q and o 32 x 64 each, k and v 32 x 32 each, MLP 3 x 32 x 48.
    linear = 6 * 100 * 2 * (2 * 32 * 64 + 2 * 32 * 32 + 3 * 32 * 48)
    near = sum(min(token + 1, 12) for token in range(100))
    streaming = 2 * 4 * 4 * 16 * near * 3.5
    assert seconds == pytest.approx((linear + streaming) / 1e6 + 2 * (0.1 * forwards + 0.2 * backwards))
    assert flops == pytest.approx(linear + streaming + 2 * 4 * 4 * 16 * 5050 * (forwards + 2.5 * backwards))


def test_the_loss_looks_at_the_end_of_every_sample() -> None:
    batch = bench(batch_size=2)._batch(700)
    assert batch["scored"].tolist() == [*range(188, 700), *range(888, 1400)]
    assert batch["weights"].sum().item() == pytest.approx(1)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["blend=[pupil]"], "blend=pupil: choose one of student, detached, teacher"),
        (["blend=[]"], "blend=[] must be a list of at least one value"),
        (["step.memory=lots"], "step.memory=lots: choose auto, outputs, least, or a budget such as 60GiB"),
        (["step.memory=0.01MiB", "context=60"], "step.memory: a step of 60 tokens needs at least"),
        (["context=1000000"], "context=1000000: tiny supports"),
        (["data.length=0"], "data.length=0 must be at least 1"),
        (["trainer.devices=2", "trainer.accelerator=cpu"], "batch_size=1, the samples of a step, is not divisible"),
        (["step.sequence_parallel=2"], "step.sequence_parallel=2 does not divide the 1 processes"),
        (["task=decode", "trainer.devices=2"], "trainer.devices=2: task=decode works on 1 device"),
        (["context=[12,60]"], "sink_size + recent_size = 12 must be below context=12, or the window hides nothing"),
        (["context=60", "first_context=9"], "sink_size + recent_size = 12 must be below first_context=9"),
        (["step.cuda_graphs=true"], "step.cuda_graphs=true: task=train_step measures steps without a graph"),
        (["heads=nowhere"], "heads=nowhere: task=train_step trains the gates of all heads"),
        (["context=60", "compare=nowhere"], "compare=nowhere: cannot be read as results of task=train_step"),
    ],
)
def test_mistakes_are_one_line(overrides: list[str], message: str, tmp_path: Path) -> None:
    assert message in run_command("benchmark", *SMALL, *overrides, folder=tmp_path).error


def test_a_run_to_compare_with_is_read_before_the_model_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*args: Any) -> None:
        raise AssertionError("loaded")

    monkeypatch.setattr(benchmark, "load_model", load)
    assert "compare=nowhere" in run_command("benchmark", *SMALL, "compare=nowhere", folder=tmp_path).error


def test_a_longer_sequence_than_the_model_is_made_for_is_refused() -> None:
    with pytest.raises(UserError, match=r"context=600: tiny supports 512 tokens"):
        bench(context=[600])


@pytest.mark.parametrize("preset", ["train-32k-teacher", "train-32k-student", "train-8k-student", "train-128k"])
def test_presets_of_steps(preset: str, tmp_path: Path) -> None:
    settings = settings_of("benchmark", BenchmarkSettings, f"preset={preset}", folder=tmp_path)
    (thousands,) = (int(word[:-1]) for word in preset.split("-") if word[:-1].isdigit())
    assert (settings.task, settings.context) == ("train_step", [thousands * 1024])


@pytest.mark.parametrize(
    ("preset", "tokens", "groups"), [("scale-32k", 32768, 8), ("scale-128k", 131072, 1), ("scale-70b-32k", 32768, 4)]
)
def test_presets_share_a_step_among_devices(preset: str, tokens: int, groups: int, tmp_path: Path) -> None:
    overrides = [f"preset={preset}", "trainer.devices=8"]
    settings = settings_of("benchmark", BenchmarkSettings, *overrides, folder=tmp_path)
    assert (settings.context, settings.batch_size) == ([tokens], groups)
    assert settings.step.sequence_parallel == 8 // groups
    check_ranks(8, settings.step.sequence_parallel, settings.batch_size)
    model = meta_model(settings.model, torch.bfloat16)
    assert model.config.max_position_embeddings >= tokens
    ranks = Ranks(groups, 8 // groups, sharded=True)
    costs = calculated_costs(model, ranks, torch.device("cuda"))
    fit_memory(settings.step, costs, ranks.tokens(tokens, settings.batch_size), 80 * 10**9)


@pytest.mark.parametrize(("preset", "first"), [("scale-70b-pair", 8192), ("scale-512k", 524288)])
def test_presets_of_two_devices_fit_them(preset: str, first: int, tmp_path: Path) -> None:
    settings = settings_of("benchmark", BenchmarkSettings, f"preset={preset}", folder=tmp_path)
    assert settings.context[0] == first
    check_ranks(2, settings.step.sequence_parallel, settings.batch_size)
    model, ranks, longest = meta_model(settings.model, torch.bfloat16), Ranks(1, 2, sharded=True), settings.context[-1]
    assert model.config.max_position_embeddings >= longest
    for blend in settings.blend:
        costs = calculated_costs(model, ranks, torch.device("cuda"), BLENDS[blend].needs_teacher, compiled=True)
        fit_memory(settings.step, costs, ranks.tokens(longest, 1), 139 * 2**30)


@pytest.mark.gpu
@pytest.mark.parametrize("blend", ["student", "teacher"])
def test_a_step_waits_for_nothing(blend: str) -> None:
    from tests.step.test_distillation import batch_of, distilling, random_sample

    model = tiny_model("llama", hidden_size=256, head_dim=64).to("cuda", torch.bfloat16)
    batch = {
        key: value.to("cuda") if torch.is_tensor(value) else value
        for key, value in batch_of(random_sample(3000, 1)).items()
    }
    with distilling(model, "hidden_l2", blend) as distillation:
        alpha = torch.full((3, 2), 0.5, device="cuda", requires_grad=True)
        for _ in range(2):
            torch.autograd.grad(distillation.loss(alpha, batch), alpha)
        torch.cuda.set_sync_debug_mode("error")
        try:
            torch.autograd.grad(distillation.loss(alpha, batch), alpha)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize("blend", ["student", "teacher"])
@pytest.mark.parametrize("compiled", [False, True])
def test_a_step_keeps_its_budget(blend: str, compiled: bool) -> None:
    """Between keeping everything and keeping the minimum; the budget includes a reserve of 1 GiB."""
    from duo_id.step.prepare import prepared_step
    from duo_id.step.recompute import Keep
    from duo_id.step.settings import StepSettings
    from tests.step.test_distillation import batch_of, distilling
    from tests.support.planted import random_sample

    sizes = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 8, "head_dim": 128}
    model = tiny_model("llama", **sizes).to("cuda", torch.bfloat16)
    batch = {
        key: value.to("cuda") if torch.is_tensor(value) else value
        for key, value in batch_of(random_sample(16384, 1)).items()
    }
    step = StepSettings(memory="3.1GiB", compile=compiled)
    with distilling(model, "hidden_l2", blend) as distillation, prepared_step(distillation, step) as apply_plan:
        plan = apply_plan(16384)
        assert plan is not None
        assert len(set(plan.levels)) > 1 or plan.levels[0] != Keep.ALL
        alpha = torch.full((8, 2), 0.5, device="cuda", requires_grad=True)
        torch.autograd.grad(distillation.loss(alpha, batch), alpha)
        torch.cuda.reset_peak_memory_stats()
        torch.autograd.grad(distillation.loss(alpha, batch), alpha)
        assert torch.cuda.max_memory_allocated() < 3.1 * 2**30
