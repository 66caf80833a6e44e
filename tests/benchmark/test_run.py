"""The benchmark command end to end on a tiny model: its output, and what it refuses."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import DictConfig, OmegaConf
from PIL import Image

from duo_id.benchmark import caches
from duo_id.benchmark.settings import BenchmarkSettings
from duo_id.common.config import conf_dir
from duo_id.common.integrity import SEAL, unsealed
from duo_id.patterns.pattern import HeadPattern
from duo_id.patterns.saved import save_pattern
from tests.support.commands import run_command, settings_of
from tests.test_layout import leaves

PRESETS = sorted(path.stem for path in (conf_dir() / "preset").glob("*.yaml"))
PUBLISHED = [preset for preset in PRESETS if preset.startswith("paper-") and preset != "paper-3m"]
SMALL = [
    "model=tiny",
    "context=[24,40]",
    "chunk_size=[16,32]",
    "sink_size=4",
    "recent_size=8",
    "sparsity=[0.5,1]",
    "repeats=2",
]
TASKS = ("decode", "prefill", "memory")  # train_step has its own tests
COUNTS = {"decode": 4 * 2, "prefill": 3 * 4, "memory": 3 * 2}  # contenders times sizes


def saved(folder: Path) -> dict[str, Any]:
    contents = json.loads((folder / "run" / "results.json").read_text())
    assert SEAL in contents
    return unsealed(contents)


@pytest.mark.parametrize("task", TASKS)
def test_a_run_leaves_results_tables_and_figures(task: str, tmp_path: Path) -> None:
    finished = run_command("benchmark", *SMALL, f"task={task}", folder=tmp_path, figures=True)
    assert finished.status == 0, finished.output
    results = saved(tmp_path)
    assert len(results["rows"]) == COUNTS[task]
    assert {row["status"] for row in results["rows"]} == {"ok"}
    assert results["task"] == task
    assert results["model"]["kv_heads"] == 2
    assert results["command"].startswith("python -m duo_id.benchmark model=tiny context=[24,40]")
    assert results["versions"].keys() >= {"duo_id", "torch", "transformers", "triton", "cuda"}
    assert results["ceilings"].keys() == {"bandwidth", "flops"}
    assert results["settings"]["sink_size"] == 4
    gains = [row["memory_saving"] for row in results["rows"] if row["attention"] == "duo"]
    assert all(gain > 1 for gain in gains)
    if task != "memory":
        assert all(row["speedup"] > 0 for row in results["rows"] if row["attention"] == "duo")
        assert all(row["over_floor"] > 0 for row in results["rows"])
    figures = {path.name for path in (tmp_path / "run").glob("*.png")}
    axes = {"context", "retrieval"} | ({"chunk_size"} if task == "prefill" else set())
    largest = {"context_over_memory.png"} if task == "memory" else set()
    assert figures == {f"{task}_over_{axis}.png" for axis in axes} | largest
    for name in figures:
        with Image.open(tmp_path / "run" / name) as image:
            assert image.width > 400
    for name in ("full SDPA", "duo 0.5", "duo 1"):
        assert name in finished.output


@pytest.mark.parametrize("task", ["decode", "prefill"])
def test_a_profile_says_where_the_time_goes(task: str, tmp_path: Path) -> None:
    overrides = [*SMALL[:-2], "sparsity=[0.5]", "repeats=1", "profile=true", f"task={task}"]
    finished = run_command("benchmark", *overrides, folder=tmp_path)
    assert finished.status == 0, finished.output
    rows = saved(tmp_path)["rows"]
    for row in rows:
        assert {"matrix products", "elementwise"} <= row["profile"].keys()
        attention = {"full": "full attention", "full-dual": "decode attention", "duo": "decode attention"}
        if task == "decode":
            assert row["profile"][attention[row["attention"]]] > 0
    assert len(list((tmp_path / "run").glob("trace_*.json"))) == len(rows), "of each row"
    assert "where the time goes (ms)" in finished.output


def test_formats_of_the_cache_stand_beside_each_other(tmp_path: Path) -> None:
    """Each with full attention over the same format, its baseline."""
    small = ["model=tiny", "context=[1500]", "sink_size=4", "recent_size=8", "kv=[exact,int4]", "repeats=2"]
    finished = run_command("benchmark", *small, "task=decode", folder=tmp_path)
    assert finished.status == 0, finished.output
    rows = {(row["attention"], row["kv"]): row for row in saved(tmp_path)["rows"]}
    of_codes = [("full-dual", "int4"), ("duo", "int4")]
    assert list(rows) == [("full", "exact"), ("full-dual", "exact"), ("duo", "exact"), *of_codes]
    duo, full = rows["duo", "int4"], rows["full-dual", "int4"]
    assert duo["speedup"] == pytest.approx(full["ms"] / duo["ms"])
    assert duo["floor_ms"] < rows["duo", "exact"]["floor_ms"]
    assert duo["cache_bytes"] < rows["duo", "exact"]["cache_bytes"]
    assert "duo 0.5 int4" in finished.output
    (tmp_path / "other").mkdir()
    refused = run_command("benchmark", *small, "task=train_step", folder=tmp_path / "other")
    assert "task=train_step has no cache" in refused.output


@pytest.mark.parametrize("task", TASKS)
def test_masks_alone(task: str, tmp_path: Path) -> None:
    """Without the baselines there are no gains, and all else is there."""
    small = [*SMALL[:-2], "sparsity=[0.5]", "repeats=1", "kv=[exact,int8]", "beside=false"]
    finished = run_command("benchmark", *small, f"task={task}", folder=tmp_path)
    assert finished.status == 0, finished.output
    rows = saved(tmp_path)["rows"]
    assert {(row["attention"], row["kv"]) for row in rows} == {("duo", "exact"), ("duo", "int8")}
    assert all(row["memory_saving"] is None and row["speedup"] is None for row in rows)


def test_the_rows_before_an_interruption_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, calls = caches.read_in_chunks, [0]

    def instead(*args):
        calls[0] += 1
        if calls[0] == 2 * 3 + 1:  # a warm-up and two runs of two rows
            raise KeyboardInterrupt
        return plain(*args)

    monkeypatch.setattr(caches, "read_in_chunks", instead)
    finished = run_command("benchmark", *SMALL, "task=prefill", folder=tmp_path)
    assert finished.status == 130
    assert len(saved(tmp_path)["rows"]) == 2
    assert (tmp_path / "run" / "prefill_over_chunk_size.png").is_file()


def test_a_run_goes_on_where_memory_is_short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = caches.decode_step

    def instead(contender, forward, cache, context, ids):
        if contender.mask is None or (context > 24 and contender.sparsity < 1):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return plain(contender, forward, cache, context, ids)

    monkeypatch.setattr(caches, "decode_step", instead)
    finished = run_command("benchmark", *SMALL, folder=tmp_path)
    assert finished.status == 0, finished.output
    fits = {(row["attention"], row["sparsity"], row["context"]) for row in saved(tmp_path)["rows"] if "ms" in row}
    assert fits == {("full-dual", 0.0, 24), ("duo", 0.5, 24), ("duo", 1.0, 24), ("duo", 1.0, 40)}
    assert "OOM" in finished.output


def test_a_pattern_brings_its_heads_and_windows(tmp_path: Path) -> None:
    scores = torch.tensor([[1.0, 0.9], [0.0, 0.1], [0.8, 0.2]])
    save_pattern(HeadPattern(scores, 2, 6), tmp_path / "heads")
    finished = run_command("benchmark", *SMALL, "task=memory", f"heads={tmp_path / 'heads'}", folder=tmp_path)
    assert finished.status == 0, finished.output
    (row,) = (row for row in saved(tmp_path)["rows"] if row["sparsity"] == 0.5 and row["context"] == 40)
    assert row["cache_bytes"] == 2 * 4 * 8 * (3 * 41 + 3 * 8)


@pytest.mark.parametrize("task", TASKS)
def test_spans_stand_beside_masks(task: str, tmp_path: Path) -> None:
    """The heads of the lowest scores get the shortest span, as many as their share says."""
    scores = torch.tensor([[1.0, 0.9], [0.0, 0.1], [0.8, 0.2]])
    save_pattern(HeadPattern(scores, 2, 6), tmp_path / "heads")
    spans = ["spans=[12,3,100]", "shares=[0.34,0.17,0.16]", "sparsity=0.5", f"heads={tmp_path / 'heads'}"]
    finished = run_command("benchmark", *SMALL, *spans, f"task={task}", folder=tmp_path)
    assert finished.status == 0, finished.output
    assert "spans 0.667" in finished.output
    rows = [row for row in saved(tmp_path)["rows"] if row["attention"] == "spans" and row["context"] == 40]
    slots = 41 if task != "prefill" else 40
    for row in rows:
        assert row["sparsity"] == pytest.approx(2 / 3)
        assert row["cache_bytes"] == 2 * 4 * 8 * (3 * slots + 2 * (2 + 12) + (2 + 3))  # 100 hides nothing
        assert row["memory_saving"] > 1
    if task == "decode":
        kinds = [[row for row in saved(tmp_path)["rows"] if row["attention"] == kind] for kind in ("full", "spans")]
        full, masked = (max(rows, key=lambda row: row["context"]) for rows in kinds)
        assert full["floor_bytes"] - masked["floor_bytes"] == 2 * 4 * 8 * (3 * 41 - 2 * 14 - 5)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["spans=8"], "spans=[8] shares=[]: give each span its share"),
        (["spans=[8,9]", "shares=[0.5,0.6]"], "together at most 1"),
        (["spans=0", "shares=0.5"], "spans=0 must be at least 1"),
        (["task=train"], "task=train: choose one of decode, prefill, memory, train_step"),
        (["context=[100,-1]"], "context=-1 must be at least 1"),
        (["context=[]"], "context=[] must be a list of at least one value"),
        (["context=1.5"], "context"),
        (["chunk_size=0"], "chunk_size=0 must be at least 1"),
        (["sparsity=1.5"], "sparsity=1.5 must be at most 1"),
        (["batch_size=0"], "batch_size=0 must be at least 1"),
        (["repeats=0"], "repeats=0 must be at least 1"),
        (["warmup=-1"], "warmup=-1 must be at least 0"),
        (["recent_size=0"], "recent_size=0 must be at least 1"),
        (["sink_size=-1"], "sink_size=-1 must be at least 0"),
        (["recent_size=1000"], "fits in the window of sink_size + recent_size = 1004: give a longer one"),
        (["seed=-1"], "seed=-1"),
        (["heads=SmolLM2-135M-Instruct"], "30 layers x 3 KV heads, but tiny has 3 layers x 2 KV heads"),
        (["heads=nowhere"], "nowhere"),
        (["preset=paper"], "preset"),
        (["model=hub", "model.id=x"], "model.architecture"),
        (
            ["+model.config.sliding_window=8", "model.architecture.model_type=mistral"],
            "every layer has a sliding window",
        ),
    ],
)
def test_mistakes_are_one_line(overrides: list[str], message: str, tmp_path: Path) -> None:
    assert message in run_command("benchmark", *SMALL, *overrides, folder=tmp_path).error


def test_one_number_needs_no_brackets(tmp_path: Path) -> None:
    overrides = ["context=100", "chunk_size=10", "sparsity=0.25"]
    settings = settings_of("benchmark", BenchmarkSettings, *overrides, folder=tmp_path)
    assert (settings.context, settings.chunk_size, settings.sparsity) == ([100], [10], [0.25])


def test_one_name_needs_no_brackets(tmp_path: Path) -> None:
    assert settings_of("benchmark", BenchmarkSettings, "blend=teacher", folder=tmp_path).blend == ["teacher"]


def test_weights_are_random_unless_asked_for(tmp_path: Path) -> None:
    assert settings_of("benchmark", BenchmarkSettings, "model=llama3-8b", folder=tmp_path).model.init == "random"
    settings = settings_of("benchmark", BenchmarkSettings, "model.init=pretrained", folder=tmp_path)
    assert settings.model.init == "pretrained"


@pytest.mark.parametrize("preset", PUBLISHED)
def test_presets_are_the_published_measurements(preset: str, tmp_path: Path) -> None:
    settings = settings_of("benchmark", BenchmarkSettings, f"preset={preset}", folder=tmp_path)
    kind, longest = preset.rpartition("-")[2], {"decode": (200_000, 800_000), "prefill": (100_000, 320_000)}
    assert settings.task in preset
    assert settings.context[-1] == longest[settings.task][kind == "gqa"]
    shape = settings.model.architecture
    assert (shape["num_attention_heads"] == shape["num_key_value_heads"]) == (kind == "mha")
    assert settings.sparsity == ([0, 0.25, 0.5, 0.75, 1] if "ratio" in preset else [{"mha": 0.75, "gqa": 0.5}[kind]])
    assert (settings.sink_size, settings.recent_size) == ({"mha": 64, "gqa": 128}[kind], 256)
    assert settings.chunk_size[-1] == 32768 or settings.task == "decode"


def test_the_longest_context_published_is_decoded_after_in_4_bits(tmp_path: Path) -> None:
    settings = settings_of("benchmark", BenchmarkSettings, "preset=paper-3m", folder=tmp_path)
    assert (settings.task, settings.context, settings.sparsity, settings.kv) == ("decode", [3_300_000], [0.5], ["int4"])


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_hold_overrides_alone(preset: str, tmp_path: Path) -> None:
    text = (conf_dir() / "preset" / f"{preset}.yaml").read_text()
    config = OmegaConf.to_container(OmegaConf.create(text))
    assert text.startswith("# @package _global_\n# ")
    for default in config.pop("defaults"):
        assert [key for key in default if key.startswith("override /")]
    base: list[DictConfig] = []
    run_command("benchmark", folder=tmp_path, command=base.append)
    assert leaves(config) <= leaves(OmegaConf.to_container(base[0])), "a preset changes values and adds none"


def test_settings_have_no_key_without_a_place_in_conf(tmp_path: Path) -> None:
    base: list[DictConfig] = []
    run_command("benchmark", folder=tmp_path, command=base.append)
    in_conf = OmegaConf.to_container(base[0])
    assert BenchmarkSettings.__dataclass_fields__.keys() == in_conf.keys() - {"preset"}


def test_the_docs_name_every_preset_and_no_other() -> None:
    docs = Path(__file__).parents[2] / "docs"
    text = "".join((docs / page).read_text() for page in ("performance.md", "scale.md"))
    names = r"paper-[0-9a-z-]+[a-z]|train-[0-9a-z-]+[a-z]|scale-[0-9][0-9a-z-]*[a-z]"
    assert set(re.findall(names, text)) == set(PRESETS)


@pytest.mark.gpu
@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("compiled", [False, True])
def test_a_run_on_the_gpu(task: str, compiled: bool, tmp_path: Path) -> None:
    sizes = ["model.architecture.head_dim=64", "model.architecture.hidden_size=256", "context=[700,3000]"]
    overrides = [*SMALL, *sizes, "chunk_size=[512,1000]", f"compile={compiled}", f"task={task}"]
    finished = run_command("benchmark", *overrides, folder=tmp_path)
    assert finished.status == 0, finished.output
    results = saved(tmp_path)
    assert len(results["rows"]) == COUNTS[task]
    for row in results["rows"]:
        assert row["status"] == "ok"
        assert row["peak_bytes"] >= row["weights_bytes"] + row["cache_bytes"]
        if task == "decode" and row["attention"] == "full":
            assert row["backend"] in ("sdpa flash", "sdpa cudnn", "sdpa efficient")
