"""Every YAML of conf/ composes to valid settings, and every mistake is one line that names the override."""

from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from duo_id.benchmark.settings import BenchmarkSettings
from duo_id.common.cli import start_run
from duo_id.common.config import conf_dir, parse, plain
from duo_id.common.errors import UserError
from duo_id.data.settings import DataGenSettings
from duo_id.evaluate.settings import EvaluateSettings
from duo_id.methods.settings import METHODS, GateSettings
from duo_id.train.fitting import train_settings
from duo_id.train.settings import TrainSettings
from tests.support.commands import run_command, settings_of

SCHEMAS = {
    "train": TrainSettings,
    "evaluate": EvaluateSettings,
    "data_gen": DataGenSettings,
    "benchmark": BenchmarkSettings,
}
NEEDED = {  # what has no default
    "evaluate": ["heads=DIR"],
    "data_gen": ["out=DIR"],
    "model/hub": ["model.id=ANY/MODEL"],
    "data/disk": ["data.path=DIR"],
    "data/haystack/file": ["data.haystack.path=FILE"],
}
CONFIGS = sorted(path.relative_to(conf_dir()).with_suffix("").as_posix() for path in conf_dir().rglob("*.yaml"))
PRESETS = ("preset/", "evaluation/")  # of benchmark, see tests/benchmark/test_run.py, and of evaluate
EXPERIMENTS = "experiment/"  # run by tests/train/test_run.py
EVALUATION_ONLY = "data/haystack/library"
ELSEWHERE = (*PRESETS, EXPERIMENTS, EVALUATION_ONLY)
OPTIONS = [config for config in CONFIGS if "/" in config and not config.startswith(ELSEWHERE)]


@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_composes(option: str, tmp_path: Path) -> None:
    group, _, choice = option.rpartition("/")
    settings = settings_of("train", TrainSettings, f"{group}={choice}", *NEEDED.get(option, []), folder=tmp_path)
    assert settings.logger["csv"]["save_dir"] == str(tmp_path / "run")
    assert type(settings.method) is METHODS[settings.method.name]
    if isinstance(settings.method, GateSettings):
        assert settings.method.optimizer["lr"] == settings.method.lr


@pytest.mark.parametrize("name", [config for config in CONFIGS if "/" not in config])
def test_every_command_composes(name: str, tmp_path: Path) -> None:
    settings = settings_of(name, SCHEMAS[name], *NEEDED.get(name, []), folder=tmp_path)
    assert settings.model.name == "SmolLM2-135M-Instruct"
    source = {"benchmark": None, "evaluate": "library"}.get(name, "embedded")
    assert source is None or settings.data.haystack.source == source


@pytest.mark.parametrize("option", ["data/haystack/library", *(x for x in CONFIGS if x.startswith("evaluation/"))])
def test_every_option_of_evaluate_composes(option: str, tmp_path: Path) -> None:
    group, _, choice = option.rpartition("/")
    settings = settings_of("evaluate", EvaluateSettings, "heads=DIR", f"{group}={choice}", folder=tmp_path)
    assert settings.data.haystack.source == "library"
    assert settings.lengths == ([1024] if choice == "quick" else [2048, 4096, 8192])


def test_model_and_haystack_of_the_command_line_win_over_the_experiment(tmp_path: Path) -> None:
    overrides = ["experiment=paper", "model=tiny", "data/haystack=embedded", "method.lr=0.5"]
    settings = settings_of("train", TrainSettings, *overrides, folder=tmp_path)
    assert (settings.model.name, settings.data.haystack.source, settings.method.lr) == ("tiny", "embedded", 0.5)
    assert (settings.method.blend, settings.trainer["max_steps"]) == ("teacher", 2000)


def test_the_paper_experiment_is_the_published_recipe(tmp_path: Path) -> None:
    settings = settings_of("train", TrainSettings, "experiment=paper", folder=tmp_path)
    method, data = settings.method, settings.data
    assert (method.blend, method.gate, method.penalty, method.objective) == ("teacher", "clamp", "l1", "hidden_l2")
    assert (method.sink_size, method.recent_size, method.reg_weight, method.lr) == (128, 256, 0.05, 0.02)
    assert (data.num_passkeys, data.passkey_words, data.num_lengths, data.length_min) == (10, 32, 50, 1000)
    assert (data.depth_min, data.depth_max, data.length_max) == (0.05, 0.95, None)
    assert (method.initial, method.warmup, data.batch_size, settings.trainer["max_steps"]) == (1.0, 0.2, 1, 2000)


@pytest.mark.parametrize("chosen", ["experiment=best", "method=nested"])
def test_the_default_is_the_measured_method(chosen: str, tmp_path: Path) -> None:
    """What docs/identification.md was measured with."""
    method = settings_of("train", TrainSettings, chosen, folder=tmp_path).method
    assert (method.blend, method.gate, method.objective) == ("student", "nested", "kl_next_token")
    assert method.tokens == "labelled"
    assert (method.prior, method.prior_weight) == (None, 0.05)
    assert (method.initial, method.temperature, list(method.budgets)) == (0.5, 0.3, [0.4, 0.97])
    assert (method.penalty, method.reg_weight) == ("l1", 0)
    if chosen == "experiment=best":
        assert (method.sink_size, method.recent_size, method.lr, method.warmup) == (64, 256, 0.02, 0.2)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """The plain values of each command's config."""
    configs: dict[str, Any] = {}
    for name in SCHEMAS:
        finished = run_command(
            name,
            "model=tiny",
            *NEEDED.get(name, []),
            folder=tmp_path_factory.mktemp("base"),
            command=lambda config, name=name: configs.update({name: OmegaConf.to_container(config, resolve=True)}),
        )
        assert finished.status == 0, finished.output
    return configs


def changed(config: dict[str, Any], changes: dict[str, Any]) -> Any:
    config = OmegaConf.create(config)
    for key, value in changes.items():
        OmegaConf.update(config, key, value, merge=False, force_add=True)
    return config


WRONG = {
    # choices and ranges
    "model.init": "nosuch",
    "model.dtype": "int8",
    "data.haystack.source": "nosuch",
    "data.length_min": 0,
    "data.length_max": 10,
    "data.num_lengths": 0,
    "data.passkey_words": 0,
    "data.num_questions": 0,
    "data.answer_words": 0,
    "data.answer_tokens": 0,
    "data.text_skip": -1,
    "data.curriculum": -1,
    "data.mixture.text": -1.0,
    "data.mixture.copying": float("nan"),
    "data.score": "maybe",
    "data.depth_min": -0.1,
    "data.depth_max": 1.1,
    "data.batch_size": 0,
    "data.num_workers": -1,
    "data.padding_side": "middle",
    "method.blend": "nosuch",
    "method.gate": "nosuch",
    "method.penalty": "nosuch",
    "method.objective": "nosuch",
    "method.sink_size": -1,
    "method.recent_size": 0,
    "method.initial": 1.5,
    "method.reg_weight": -0.1,
    "method.lr": 0.0,
    "method.warmup": 0.6,
    "step.full_backend": "nosuch",
    "step.streaming_backend": "nosuch",
    "step.length_multiple": 0,
    "comparison.samples": 0,
    "comparison.random_masks": -1,
    "comparison.validation_samples": -1,
    "trainer.accumulate_grad_batches": 2,
    "trainer.max_steps": -1,
    "trainer.precision": "bf16-true",
    "checkpoint_seconds": -1,
    "sparsity": [],
    # types
    "seed": None,
    "data.length_max ": 1.5,
    "method.lr ": "fast",
    "method.optimizer": 3,
    "model.architecture": "big",
    "trainer.max_steps ": "many",
    "trainer.max_steps  ": None,
    # not there
    "method.nosuch": 1,
    "model.nosuch": 1,
    "data.haystack.nosuch": 1,
    "step.nosuch": 1,
    "comparison.nosuch": 1,
    "nosuch": 1,
    # missing
    "model.id": "???",
    "method.sink_size ": "???",
    "comparison.samples ": "???",
    "sparsity ": "???",
}


@pytest.mark.parametrize("key", WRONG)
def test_a_wrong_value_is_one_line_that_names_the_override(key: str, base: dict[str, dict[str, Any]]) -> None:
    with pytest.raises(UserError) as raised:
        train_settings(changed(base["train"], {key.strip(): WRONG[key]}))
    message = str(raised.value)
    assert "\n" not in message
    assert key.strip() in message
    assert "instance of" not in message


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"sparsity": [0.5, 1.5]}, "sparsity=1.5"),
        ({"sparsity": [float("nan")]}, "sparsity=nan"),
        ({"sparsity": ["half"]}, "sparsity=half must be a number"),
        ({"model.init": "random", "model.architecture": {}}, "model.architecture"),
        ({"data.haystack.source": "file"}, "data.haystack.path=FILE"),
        ({"data.haystack.source": "hub"}, "data.haystack.id=DATASET"),
        ({"data.task": "disk"}, "data.path=DIR"),
        ({"data.mixture": {"passkey": 0.0, "text": 0.0}}, "data.mixture.passkey=1"),
        ({"data.curriculum": 9, "data.num_lengths": 1}, "data.curriculum=9 needs data.num_lengths"),
        ({"data.depth_min": 0.8, "data.depth_max": 0.2}, "data.depth_min=0.8 and data.depth_max=0.2"),
        ({"method.sink_size": 100, "method.recent_size": 156}, "= 256 must be below data.length_min=256"),
        ({"method.lr": float("nan")}, "method.lr=nan"),
    ],
)
def test_values_that_do_not_go_together(changes: dict[str, Any], named: str, base: dict[str, dict[str, Any]]) -> None:
    with pytest.raises(UserError) as raised:
        train_settings(changed(base["train"], changes))
    assert named in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(("name", "key"), [("evaluate", "heads"), ("data_gen", "out"), ("data_gen", "n")])
def test_missing_values_of_the_other_commands_are_named(name: str, key: str, base: dict[str, dict[str, Any]]) -> None:
    with pytest.raises(UserError, match=f"^{key}: .*missing"):
        parse(SCHEMAS[name], changed(base[name], {key: "???"}))


def test_samples_on_disk_have_lengths_of_their_own(base: dict[str, dict[str, Any]]) -> None:
    changes = {"data": {"task": "disk", "path": "DIR"}, "method.recent_size": 4000}
    assert train_settings(changed(base["train"], changes)).data.path == "DIR"


def test_plain_settings_come_back_the_same(base: dict[str, dict[str, Any]]) -> None:
    settings = train_settings(OmegaConf.create(base["train"]))
    assert train_settings(OmegaConf.create(plain(settings))) == settings


def test_an_override_may_refer_to_other_settings(tmp_path: Path) -> None:
    runs: list[Any] = []
    overrides = ["data.num_passkeys=3", "seed=${data.num_passkeys}"]
    finished = run_command("train", *overrides, folder=tmp_path, command=lambda config: runs.append(start_run(config)))
    assert finished.status == 0, finished.output
    ((config, _, arguments),) = runs
    assert config.seed == 3
    assert arguments[:2] == overrides
    for name, base in (("train", ["model=tiny"]), ("evaluate", ["heads=SmolLM2-135M-Instruct", "model=tiny"])):
        error = run_command(name, *base, "seed=${not.there}", folder=tmp_path).error
        assert error.startswith("error: seed: Interpolation key 'not.there' not found")
