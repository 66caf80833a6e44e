"""The command train from end to end on tiny random weights: what a run writes, and what it refuses."""

import hashlib
import importlib.util
import json
import math
import signal
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

import duo_id.train.run
from duo_id import load_pattern
from duo_id.common import user_cache
from duo_id.common.config import conf_dir, plain
from duo_id.common.integrity import DIGEST_PREFIX, unsealed
from duo_id.common.record import SETTINGS, keep_settings
from duo_id.data.datamodule import SampleModule
from duo_id.data.haystack import with_digest
from duo_id.methods.settings import GateSettings
from duo_id.models.language_model import LanguageModel
from duo_id.patterns.files import TABLES
from duo_id.step.objectives import OBJECTIVES, Outputs
from duo_id.train.checkpoints import CHECKPOINT
from duo_id.train.history import read_history
from duo_id.train.scoring import score
from duo_id.train.settings import TrainSettings
from tests.support.commands import QUICK, Finished, run_command, settings_of
from tests.support.figures import blank_figures
from tests.support.processes import run_module, start

ROOT = Path(__file__).parents[2]
SIZES = [override for override in QUICK if override.startswith("data.")]
EXPERIMENTS = sorted(path.stem for path in (conf_dir() / "experiment").glob("*.yaml"))
FEWER = {"spans": ["method.samples=2"], "reasoning": ["data.self_samples=4", "data.self_share=0.25"]}
VALIDATED = ("distill", "answer_loss_0", "answer_loss_25", "answer_loss_50", "token_accuracy_0", "token_accuracy_50")
TRAINED = ("loss", "distill", "lr", "length", "tokens_per_s")


@pytest.fixture(scope="module", autouse=True)
def quiet() -> Iterator[None]:
    """Keep wandb offline and out of the home folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "offline")
        patch.setenv("WANDB_SILENT", "true")
        yield


@dataclass(frozen=True)
class Run:
    """A finished training run."""

    folder: Path
    finished: Finished
    model: LanguageModel
    hashes: list[str]  # of the model's parameters, before and after

    @property
    def summary(self) -> dict[str, Any]:
        """The content of summary.json."""
        return json.loads((self.folder / "summary.json").read_text())

    def rows(self, heads: str) -> list[dict[str, Any]]:
        """The summary's results for these heads."""
        return [row for row in self.summary["results"] if row["heads"] == heads]


def hash_of(model: LanguageModel) -> str:
    digest = hashlib.sha256()
    for name, tensor in model.model.state_dict().items():
        digest.update(name.encode() + tensor.numpy().tobytes())
    return digest.hexdigest()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run through the real command, two steps long."""
    folder = tmp_path_factory.mktemp("train")
    loaded: list[LanguageModel] = []
    hashes: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        load = duo_id.train.run.load_model

        def watched(*args: Any) -> LanguageModel:
            loaded.append(load(*args))
            hashes.append(hash_of(loaded[0]))
            return loaded[0]

        patch.setattr(duo_id.train.run, "load_model", watched)
        finished = run_command("train", *QUICK, "seed=5", folder=folder, figures=True)
    assert finished.status == 0, finished.output
    return Run(folder / "run", finished, loaded[0], [*hashes, hash_of(loaded[0])])


def test_heads_are_exported_in_both_formats(run: Run) -> None:
    pattern = load_pattern(run.folder)
    assert tuple(pattern.scores.shape) == (3, 2)
    assert (pattern.sink_size, pattern.recent_size) == (4, 60)
    assert pattern.provenance["model"]["id"] == "tiny"
    assert pattern.provenance["seed"] == 5
    assert pattern.provenance["steps"] == 2
    table = np.loadtxt(run.folder / "heads" / "full_attention_heads.tsv", dtype=float, delimiter="\t")
    np.testing.assert_array_equal(table.astype(np.float32), pattern.scores.numpy())
    sizes = json.loads((run.folder / "heads" / "config.json").read_text())
    assert (sizes["sink_size"], sizes["recent_size"]) == (4, 60)
    for sparsity in (25, 50):
        mask = np.loadtxt(run.folder / "heads" / f"mask_sparsity_{sparsity}.tsv", delimiter="\t")
        np.testing.assert_array_equal(mask, pattern.binarize(sparsity=sparsity / 100).retrieval.numpy())


def test_gates_have_moved(run: Run) -> None:
    scores = load_pattern(run.folder).scores
    assert scores.min() < 0.5 < scores.max(), "some heads have gained, others lost"
    assert scores.max() - scores.min() < 0.2, "in two steps not far"
    assert "mean_gate" not in run.summary, "nested masks rank heads"


def test_the_language_model_is_unchanged(run: Run) -> None:
    assert run.hashes[0] == run.hashes[1]
    assert not run.model.model.training
    for name, parameter in run.model.model.named_parameters():
        assert parameter.grad is None, name
        assert not parameter.requires_grad, name


def test_figures_are_valid_images(run: Run) -> None:
    for name in ("gates", "training"):
        with Image.open(run.folder / "figures" / f"{name}.png") as image:
            image.verify()
            assert image.format == "PNG"
            assert min(image.size) > 300


def test_summary_compares_found_masks_with_full_random_and_streaming(run: Run) -> None:
    (full,), (streaming,) = run.rows("full"), run.rows("streaming")
    assert (full["sparsity"], streaming["sparsity"]) == (0.0, 1.0)
    assert [row["sparsity"] for row in run.rows("found")] == [0.25, 0.5]
    assert [(row["sparsity"], row["seed"]) for row in run.rows("random")] == [
        (sparsity, seed) for sparsity in (0.25, 0.5) for seed in (5, 6, 7)
    ]
    assert len(run.summary["results"]) == 10
    for row in run.summary["results"]:
        assert row["answers"] == 4  # two samples with two passkeys each
        assert row["tokens"] == full["tokens"] > 20
        assert 3 < row["answer_loss"] < 9
    assert full["answer_loss"] != streaming["answer_loss"]
    settings = settings_of("train", TrainSettings, *QUICK, folder=run.folder)
    samples = SampleModule(settings.data, run.model.tokenizer, 5).samples("test", 2)
    scores = [score(run.model, sample) for sample in samples]
    assert full["answer_loss"] == pytest.approx(sum(score.loss / score.tokens for score in scores) / 2)
    assert full["loss"] == pytest.approx(sum(score.loss for score in scores))
    assert run.summary["steps"] == 2
    assert run.summary["settings"]["method"]["sink_size"] == 4
    assert run.summary["versions"]["torch"] == torch.__version__


def test_terminal_shows_the_table_and_where_things_are(run: Run) -> None:
    for words in (
        "full attention",
        "found mask",
        "random masks (3)",
        "all heads stream",
        str(run.folder / "heads"),
        "step 2/2",
    ):
        assert words in run.finished.output


def test_metrics_hold_training_and_validation(run: Run) -> None:
    table = pd.read_csv(run.folder / "metrics" / "version_0" / "metrics.csv")
    for column in [f"train/{name}" for name in TRAINED] + [f"val/{name}" for name in VALIDATED]:
        values = table[column].dropna()
        assert len(values) == 2, column  # two steps, a validation after each
        assert all(map(math.isfinite, values)), column
    assert not {"train/penalty", "train/mean_gate"} & set(table), "nested masks have neither"
    assert set(table["train/length"].dropna()) <= {700, 800}


def test_gates_over_training_end_with_those_exported(run: Run) -> None:
    history = read_history(run.folder)
    assert history.index.tolist() == [0, 1, 2]
    pattern = load_pattern(run.folder)
    assert (history.iloc[0] == 0.5).all()
    assert history.columns.tolist() == [(layer, head) for layer in pattern.gated_layers for head in range(2)]
    np.testing.assert_allclose(history.iloc[-1], pattern.scores.flatten(), rtol=1e-4)


def test_run_folder_keeps_its_settings_and_command_line(run: Run) -> None:
    kept = json.loads((run.folder / SETTINGS).read_text())["settings"]
    assert (kept["model"]["name"], kept["sparsity"]) == ("tiny", [0.25, 0.5])
    assert set(kept["logger"]) == {"csv"}
    assert "model=tiny" in (run.folder / ".hydra" / "overrides.yaml").read_text()
    assert (run.folder / CHECKPOINT).is_file()


def test_all_that_is_read_again_carries_a_checksum(run: Run) -> None:
    for name in ("settings.json", "summary.json", "heads/heads.json", "heads/config.json"):
        contents = json.loads((run.folder / name).read_text())
        assert unsealed(contents) != contents, name
    tables = {path.name for path in (run.folder / "heads").glob("*.tsv")}
    assert json.loads((run.folder / "heads" / "config.json").read_text())[TABLES].keys() == tables
    assert DIGEST_PREFIX in (run.folder / "gates.csv").read_text().splitlines()[1]
    assert ZipFile(run.folder / CHECKPOINT).comment.startswith(DIGEST_PREFIX.encode())


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_runs_a_step(experiment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(user_cache, "user_cache_path", lambda name: tmp_path / "cache")
    quick = [override for override in QUICK if override != "data=passkey"]
    overrides = [f"experiment={experiment}", *quick, "data/haystack=embedded", "data.num_questions=1"]
    quicker = [
        "trainer.max_steps=1",
        "comparison.samples=1",
        "comparison.random_masks=1",
        "sparsity=[0.5]",
        "step.compile=false",
        *FEWER.get(experiment, []),
    ]
    settings = settings_of("train", TrainSettings, *overrides, *quicker, folder=tmp_path)
    with nullcontext() if experiment == "spans" else blank_figures():
        summary = duo_id.train.run.train(settings, tmp_path / "run")
    spans = ["spans"] if experiment == "spans" else []
    assert [row["heads"] for row in summary["results"]] == ["full", "found", *spans, "random", "streaming"]
    assert (tmp_path / "run" / "figures" / "spans.png").is_file() == bool(spans)
    assert load_pattern(tmp_path / "run").provenance["settings"]["method"] == plain(settings)["method"]
    trained = isinstance(settings.method, GateSettings)
    assert not trained or settings.method.optimizer["lr"] == settings.method.lr
    assert (tmp_path / "run" / "figures" / "training.png").is_file() == trained


def test_wandb_offline_beside_the_csv(tmp_path: Path) -> None:
    overrides = ["logger=wandb", "logger.wandb.offline=true", "comparison.samples=1", "comparison.random_masks=0"]
    finished = run_command("train", *QUICK, *overrides, folder=tmp_path)
    assert finished.status == 0, finished.output
    (offline,) = (tmp_path / "run" / "wandb").glob("offline-run-*")
    assert (next(offline.glob("run-*.wandb"))).stat().st_size > 0
    assert len(list(offline.glob("files/media/images/gates_*.png"))) == 2  # a heatmap for each validation
    assert (tmp_path / "run" / "metrics" / "version_0" / "metrics.csv").is_file()
    assert (tmp_path / "run" / "figures" / "training.png").is_file()


def test_without_a_logger_there_is_no_curve(tmp_path: Path) -> None:
    overrides = ["~logger", "trainer.max_steps=1", "comparison.samples=1", "comparison.validation_samples=0"]
    finished = run_command("train", *QUICK, *overrides, "comparison.random_masks=0", folder=tmp_path)
    assert finished.status == 0, finished.output
    assert [path.name for path in (tmp_path / "run" / "figures").iterdir()] == ["gates.png"]


def test_trains_on_samples_from_disk(tmp_path: Path) -> None:
    spec = importlib.util.spec_from_file_location("data_gen_write", ROOT / "data_gen" / "write.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    counts = ["n=3", "n_validation=1", "n_test=2", f"out={tmp_path / 'samples'}"]
    written = run_command("data_gen", "model=tiny", *SIZES, *counts, folder=tmp_path, command=script.generate)
    assert written.status == 0, written.output
    overrides = [override for override in QUICK if not override.startswith("data")]
    disk = ["data=disk", f"data.path={tmp_path / 'samples'}"]
    finished = run_command("train", *overrides, *disk, folder=tmp_path)
    assert finished.status == 0, finished.output
    asked = [*overrides, *disk, "method@method.prior=reconstruction", f"hydra.run.dir={tmp_path / 'other'}"]
    refused = run_command("train", *asked, folder=tmp_path)
    assert refused.status == 2, refused.output
    assert "has 3: lower method.prior.samples; method.prior=null does without" in refused.output


@pytest.fixture(scope="module")
def bad(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of unusable files."""
    folder = tmp_path_factory.mktemp("bad")
    (folder / "short.txt").write_text("Too little text.\n")
    (folder / "folder").mkdir()
    (folder / "broken" / "checkpoints").mkdir(parents=True)
    (folder / "broken" / CHECKPOINT).write_text("no checkpoint")
    settings = settings_of("train", TrainSettings, *QUICK, folder=folder)
    keep_settings(folder / "broken", plain(replace(settings, data=with_digest(settings.data))), {})
    (folder / "lost" / "checkpoints").mkdir(parents=True)
    (folder / "lost" / CHECKPOINT).write_text("")
    (folder / "config.json").write_text('{"sink_size": 4, "recent_size": 60}')
    (folder / "malformed.tsv").write_text("0.1\t0.2\n0.3\tsix\n")
    (folder / "good.tsv").write_text("0.1\t0.2\n0.3\t0.4\n")
    (folder / "heads.json").write_text("{")
    (folder / "wide").mkdir()
    (folder / "wide" / "config.json").write_text('{"sink_size": 400, "recent_size": 400}')
    (folder / "wide" / "full_attention_heads.tsv").write_text("0.1\t0.2\n" * 3)
    return folder


REFUSED_BY_TRAIN = {
    "no-attention": (
        [
            "~model.architecture",
            "+model.architecture={model_type:mamba,num_hidden_layers:2,vocab_size:258}",
        ],
        "no attention that can be gated",
    ),
    "seed": (["seed=-1"], "seed=-1"),
    "max-time": (["+trainer.max_time=00:00:01"], "trainer.max_time"),
    "graphs-of-batches": (["step.cuda_graphs=true", "data.batch_size=2"], "data.batch_size=1"),
    "disk-that-refuses": (["hydra.run.dir=/proc/run"], "/proc/run"),
    "unknown-override": (["nosuch.key=1"], "nosuch.key"),
    "unreadable-override": (["method.lr=["], "["),
    "unknown-model": (["model=nosuch"], "model=nosuch: choose one of "),
    "unknown-experiment": (["experiment=nosuch"], "experiment=nosuch: choose one of "),
    "no-trainer": (["trainer=null"], "override"),
    "unknown-blend": (["method.blend=nosuch"], "method.blend=nosuch"),
    "order-of-one-head": (
        ["method=nested", "model.architecture.num_hidden_layers=1", "model.architecture.num_key_value_heads=1"],
        "method.gate=nested: the model has a single gated head",
    ),
    "unknown-optimizer": (["method.optimizer._target_=nosuch.Optimizer"], "nosuch.Optimizer"),
    "unknown-trainer-argument": (["+trainer.nosuch=1"], "nosuch"),
    "logger-of-the-trainer": (["+trainer.logger=false"], "trainer.logger=false: choose logger=csv"),
    "folder-of-the-trainer": (
        ["+trainer.default_root_dir=here"],
        "trainer.default_root_dir=here: a run writes to hydra",
    ),
    "plugins": (["+trainer.plugins=[]"], "trainer.plugins=[]: the run has its own"),
    "sampler": (["+trainer.use_distributed_sampler=true"], "trainer.use_distributed_sampler=true: leave it out"),
    "no-callback": (["+trainer.callbacks=[stop]"], "trainer.callbacks: stop is not a callback"),
    "another-class": (["+trainer.callbacks=[{_target_: builtins.dict}]"], "is not a callback"),
    "no-such-callback": (
        ["+trainer.callbacks=[{_target_: nosuch.Callback}]"],
        "trainer.callbacks.0._target_=nosuch.Callb",
    ),
    "two-timers": (["+trainer.callbacks=[{_target_: lightning.pytorch.callbacks.Timer}]"], "trainer.callbacks="),
    "callbacks-without-training": (
        ["method=random", "+trainer.callbacks=[{_target_: lightning.Callback}]"],
        "trainer.callbacks: method=random trains nothing",
    ),
    "two-devices": (["trainer.devices=2"], "data.batch_size=2"),
    "no-such-accelerator": (["trainer.accelerator=nosuch"], "nosuch"),
    "too-many-passkeys": (["data.num_passkeys=100"], "data.num_passkeys=100"),
    "short-context": (["data.num_passkeys=9"], "data.length_min=700 is too short for 9 passkeys"),
    "context-beyond-the-model": (["data.length_max=5000"], "data.length_max=5000 exceeds the 4096 tokens"),
    "short-haystack": (["data/haystack=file", "data.haystack.path=short.txt"], "data.haystack"),
    "no-haystack": (["data/haystack=file", "data.haystack.path=nosuch.txt"], "data.haystack.path=nosuch.txt"),
    "window-not-below-context": (["method.recent_size=696"], "method.sink_size + method.recent_size = 700"),
    "no-dataset": (["data=disk", "data.path=nosuch"], "data.path=nosuch"),
    "resume-without-folder": (["resume=nosuch"], "resume=nosuch"),
    "resume-without-checkpoint": (["resume=folder"], "resume=folder"),
    "resume-without-settings": (["resume=lost"], SETTINGS),
    "resume-broken-checkpoint": (["resume=broken"], "is not a checkpoint"),
    "impossible-architecture": (["model.architecture.model_type=nosuch"], "model.architecture"),
}


@pytest.mark.parametrize("case", REFUSED_BY_TRAIN)
def test_train_refuses_bad_input_in_one_line(case: str, bad: Path) -> None:
    overrides, named = REFUSED_BY_TRAIN[case]
    quick = [] if case.startswith("resume") else QUICK
    if case == "no-dataset":  # which has none of the settings of samples
        quick = [override for override in QUICK if not override.startswith("data")]
    assert named in run_command("train", *quick, *overrides, folder=bad).error
    assert not list(bad.glob("*/heads")), "nothing is exported"


def test_a_loss_that_is_not_finite_ends_the_run_which_can_be_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    overrides = ["trainer.max_steps=4", "comparison.validation_samples=0", "comparison.random_masks=0"]
    plain, calls, handler = OBJECTIVES["kl_next_token"], [0], signal.getsignal(signal.SIGINT)

    def breaks(*outputs: Outputs) -> torch.Tensor:
        calls[0] += 1
        return plain(*outputs) * (torch.nan if calls[0] == 3 else 1)

    with monkeypatch.context() as patch:
        patch.setitem(OBJECTIVES, "kl_next_token", replace(plain, function=breaks))
        finished = run_command("train", *QUICK, *overrides, "checkpoint_seconds=0", folder=tmp_path)
    assert signal.getsignal(signal.SIGINT) is handler, "Ctrl-C still goes to the ended run"
    assert "no longer finite at step 3" in finished.error
    assert not (tmp_path / "run" / "heads").exists()
    saved = torch.load(tmp_path / "run" / CHECKPOINT, weights_only=True)
    assert saved["global_step"] == 2
    assert saved["state_dict"]["gates.weight"].isfinite().all()
    resumed = run_command("train", f"resume={tmp_path / 'run'}", folder=tmp_path)
    assert resumed.status == 0, resumed.output
    assert load_pattern(tmp_path / "run").provenance["steps"] == 4


def test_a_refused_resume_does_not_spoil_the_run(tmp_path: Path) -> None:
    overrides = ["comparison.validation_samples=0", "comparison.random_masks=0", "comparison.samples=1"]
    assert run_command("train", *QUICK, *overrides, folder=tmp_path).status == 0
    run = f"resume={tmp_path / 'run'}"
    other = run_command("train", run, "model.id=other", folder=tmp_path)
    assert "model.id=tiny, this run has model.id=other" in other.error
    assert "seed=0, this run has seed=5" in run_command("train", run, "seed=5", folder=tmp_path).error
    assert "method=search: resume=" in run_command("train", run, "method=search", folder=tmp_path).error
    resumed = run_command("train", run, "trainer.max_steps=3", folder=tmp_path)
    assert resumed.status == 0, resumed.output
    assert load_pattern(tmp_path / "run").provenance["steps"] == 3


def test_resuming_on_another_text_is_refused(tmp_path: Path) -> None:
    overrides = ["comparison.validation_samples=0", "comparison.random_masks=0", "comparison.samples=1"]
    text = ["data/haystack=file", f"data.haystack.path={tmp_path}/mine.txt"]
    (tmp_path / "mine.txt").write_text("One sentence after another, and all of them are about nothing. " * 500)
    assert run_command("train", *QUICK, *overrides, *text, folder=tmp_path).status == 0
    provenance = load_pattern(tmp_path / "run").provenance
    assert len(provenance["settings"]["data"]["haystack"]["sha256"]) == 64
    (tmp_path / "mine.txt").write_text("One sentence after another, and none of them is about nothing. " * 500)
    refused = run_command("train", f"resume={tmp_path / 'run'}", "trainer.max_steps=3", folder=tmp_path)
    assert "the text of data.haystack.source=file has the digest" in refused.error


def test_a_sweep_makes_a_run_folder_for_each_seed_and_continues_after_a_failed_job(tmp_path: Path) -> None:
    quicker = ["trainer.max_steps=1", "comparison.samples=1", "comparison.validation_samples=0"]
    sweep = ["seed=0,1", "data.length_min=1,700"]  # 1 is too short
    command = ["duo_id.train", "--multirun", *QUICK, *quicker, *sweep]
    status, output = start(run_module, *command, cwd=tmp_path, file=tmp_path / "output.txt").finish()
    assert status == 2, output
    assert output.count("error: ") == 2
    assert "Traceback" not in output
    folders = sorted(path.parents[1] for path in (tmp_path / "outputs" / "sweeps").glob("*/*/*/heads/heads.json"))
    assert [folder.name for folder in folders] == ["2", "3"]  # after the two that failed
    assert [load_pattern(folder).provenance["seed"] for folder in folders] == [0, 1]
    summaries = [json.loads((folder / "summary.json").read_text()) for folder in folders]
    assert summaries[0]["results"][0]["answer_loss"] != summaries[1]["results"][0]["answer_loss"]
    for summary in summaries:  # selection and evaluation use different samples
        tested = [row["answer_loss"] for row in summary["results"] if row["heads"] == "found"]
        assert math.isfinite(summary["validation_loss"])
        assert summary["validation_loss"] != pytest.approx(sum(tested) / len(tested))
    assert "python -m duo_id.report outputs/sweeps/" in output
    assert not (tmp_path / "outputs" / "train").exists()


def test_a_memory_plan_is_printed_in_one_line(tmp_path: Path) -> None:
    finished = run_command("train", *QUICK, "step.memory=1GiB", folder=tmp_path)
    assert finished.status == 0, finished.output
    (line,) = [line for line in finished.output.splitlines() if line.startswith("memory of a device with 800 tokens")]
    assert "of 3 layers keep 3 everything, 0 their attention" in line
