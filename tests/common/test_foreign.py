"""Patterns and run folders of strangers are data: each exploit would leave a marker file, or a secret in a result."""

import json
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from omegaconf import DictConfig, OmegaConf
from transformers import LlamaConfig

from duo_id.common.config import conf_dir, parse, plain
from duo_id.common.errors import UserError
from duo_id.common.foreign import is_allowed_class, model_of
from duo_id.common.mistakes import escape_interpolations
from duo_id.evaluate import run as evaluating
from duo_id.models.language_model import LanguageModel
from duo_id.models.settings import ModelSettings
from duo_id.patterns.pattern import HeadPattern
from duo_id.patterns.saved import load_pattern, save_pattern
from duo_id.patterns.sharing import model_card
from duo_id.report.__main__ import main as report
from duo_id.train.settings import TrainSettings
from tests.evaluate.test_run import SMALL
from tests.support.commands import QUICK, Finished, run_command, settings_of

SECRET = "s3cr3t-of-this-machine"
TEXT = "${oc.env:DUO_ID_SECRET}"
TINY = OmegaConf.to_container(OmegaConf.load(conf_dir() / "model" / "tiny.yaml"))
SCORES = torch.tensor([[0.1, 0.9], [0.3, 0.2], [0.8, 0.4]])
FEW = ["trainer.max_steps=1", "comparison.samples=1", "comparison.random_masks=0", "comparison.validation_samples=0"]
QUICKER = [*(override for override in QUICK if override.split("=")[0] not in {few.split("=")[0] for few in FEW}), *FEW]
TEMPLATE = "import pathlib\npathlib.Path({marker!r}).write_text('code ran')\n"


@pytest.fixture(autouse=True)
def secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DUO_ID_SECRET", SECRET)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    """What no test may find, unless a user typed what writes it."""
    return tmp_path / "marker"


def pattern(folder: Path, model: Any) -> str:
    """A head pattern that says it was found on this model, as an override."""
    save_pattern(HeadPattern(SCORES, 4, 60, provenance={"settings": {"model": model}}), folder / "theirs")
    return f"heads={folder / 'theirs'}"


def repository(folder: Path, marker: Path) -> Path:
    """A model whose repository has code of its own, which writes the marker when it is imported."""
    folder.mkdir()
    classes = {"AutoConfig": "theirs.Config", "AutoModelForCausalLM": "theirs.Model"}
    shape = {"num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 32}
    config = LlamaConfig(**shape).to_dict() | {"model_type": "theirs", "auto_map": classes}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "theirs.py").write_text(
        TEMPLATE.format(marker=str(marker))
        + "from transformers import LlamaConfig, LlamaForCausalLM\n\n\nclass Config(LlamaConfig):\n"
        + "    model_type = 'theirs'\n\n\nclass Model(LlamaForCausalLM):\n    config_class = Config\n"
    )
    return folder


def evaluate(folder: Path, *overrides: str) -> Finished:
    small = [override for override in SMALL if override != "model=tiny"]
    return run_command("evaluate", *small, "generate=false", "random_masks=0", *overrides, folder=folder)


def test_a_pattern_does_not_switch_on_the_code_of_a_repository(tmp_path: Path, marker: Path) -> None:
    model = {"id": str(repository(tmp_path / "repository", marker)), "trust_remote_code": True}
    finished = evaluate(tmp_path, pattern(tmp_path, model))
    assert "cannot be loaded" in finished.error
    assert not marker.exists()
    first = finished.output.splitlines()[0]
    assert first.startswith(f"the model that heads={tmp_path / 'theirs'} names: {model['id']}; for another give model=")
    assert "trust_remote_code=true, which no pattern switches on" in first


def test_code_of_a_repository_that_only_the_pattern_names_is_not_run(tmp_path: Path, marker: Path) -> None:
    model = {"id": str(repository(tmp_path / "repository", marker)), "trust_remote_code": True}
    finished = evaluate(tmp_path, pattern(tmp_path, model), "+model.trust_remote_code=true")
    assert "model.trust_remote_code=true: heads=" in finished.error
    assert "give model.id too" in finished.error
    assert not marker.exists()


def test_code_of_a_repository_that_the_user_names_runs(tmp_path: Path, marker: Path) -> None:
    model_id = str(repository(tmp_path / "repository", marker))
    typed = ["model=hub", f"model.id={model_id}", "+model.trust_remote_code=true"]
    evaluate(tmp_path, pattern(tmp_path, {"id": model_id}), *typed)
    assert marker.exists(), "or the tests above prove nothing"


def test_a_model_is_shown_before_it_is_loaded(tmp_path: Path) -> None:
    heads = pattern(tmp_path, {"id": "someone/something", "revision": "0abc"})

    def load(*_: Any) -> LanguageModel:
        raise UserError("loading")

    with patch.object(evaluating, "load_model", load):
        finished = evaluate(tmp_path, heads)
    shown, error = finished.output.splitlines()
    assert "someone/something (revision 0abc)" in shown
    assert error == "error: loading"


def test_text_of_a_pattern_stays_text_in_results_reports_and_cards(tmp_path: Path) -> None:
    heads = pattern(tmp_path, TINY | {"name": TEXT, "revision": TEXT})
    finished = evaluate(tmp_path, heads, "tasks=[language]", "baselines=[]")
    assert finished.status == 0, finished.output
    results = (tmp_path / "run" / "results.json").read_text()
    assert json.loads(results)["model"]["name"] == json.loads(results)["settings"]["model"]["name"] == TEXT
    resumed = run_command("evaluate", f"resume={tmp_path / 'run'}", folder=tmp_path)
    assert resumed.status == 0, resumed.output
    report([str(tmp_path / "run"), f"out={tmp_path / 'report.html'}"])
    card = model_card(load_pattern(tmp_path / "theirs"), "user/repo")
    assert TEXT in finished.output
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert any(path.suffix == ".html" for path in written)
    for text in (
        finished.output,
        resumed.output,
        card,
        *(path.read_bytes().decode(errors="replace") for path in written),
    ):
        assert SECRET not in text


CODE_IN_A_SHAPE: dict[str, Any] = {
    "kernels": {"architecture": TINY["architecture"] | {"attn_implementation": "someone/kernels"}},
    "private": {"config": {"_attn_implementation": "someone/kernels"}},
    "private-number": {"config": {"_private": 1}},
    "code": {"config": {"auto_map": {"AutoConfig": "theirs.Config"}}},
    "remote-code": {"config": {"trust_remote_code": True}},
    "target": {"architecture": {"model_type": "llama", "x": {"_target_": "os.system"}}},
    "interpolated": {"architecture": TINY["architecture"] | {"model_type": TEXT}},
    "path-as-wheel": {"wheel": "../theirs"},
    "name-of-two-lines": {"name": "a\nb"},
    "no-text": {"id": {"_target_": "os.system"}},
    "no-id": {"id": None},
    "no-mapping": None,
    "no-shape": {"architecture": [1]},
    "many-layers": {"architecture": TINY["architecture"] | {"num_hidden_layers": 10**9}},  # minutes, if they were made
    "many-experts": {"config": {"num_local_experts": 10**6}},
    "wide": {"config": {"hidden_size": 10**15}},
}


@pytest.mark.parametrize("case", CODE_IN_A_SHAPE)
def test_of_a_model_a_pattern_gives_names_and_numbers(case: str, tmp_path: Path) -> None:
    changes = CODE_IN_A_SHAPE[case]
    finished = evaluate(tmp_path, pattern(tmp_path, "llama" if changes is None else TINY | changes))
    assert f"heads={tmp_path / 'theirs'}: " in finished.error
    assert "give model=NAME" in finished.error
    assert SECRET not in finished.output


def test_weights_that_no_memory_holds_are_not_asked_for(tmp_path: Path) -> None:
    model = TINY | {"architecture": TINY["architecture"] | {"vocab_size": 2**24, "hidden_size": 2**14}}
    error = evaluate(tmp_path, pattern(tmp_path, model)).error
    assert "GiB of random weights, and cpu has" in error
    model = TINY | {"architecture": TINY["architecture"] | {"vocab_size": 2**40}}
    message = "model.architecture.vocab_size=1099511627776 must be a whole number"
    assert message in evaluate(tmp_path, pattern(tmp_path, model)).error


def test_every_model_of_ours_comes_back_from_a_pattern() -> None:
    for path in (conf_dir() / "model").glob("*.yaml"):
        config = OmegaConf.create({"id": "any/model"}) if path.stem == "hub" else OmegaConf.load(path)
        settings = parse(ModelSettings, config)
        restored = model_of({"settings": {"model": plain(settings)}}, "heads=X")
        assert parse(ModelSettings, OmegaConf.create(restored)) == settings


@pytest.mark.parametrize("text", [TEXT, r"\${x}", "${", r"a\\${b", "}${{", "$" * 3 + "{"])
def test_a_literal_is_given_back_by_omegaconf(text: str) -> None:
    config = OmegaConf.merge(OmegaConf.create({"x": ["other"]}), OmegaConf.create(escape_interpolations({"x": [text]})))
    assert OmegaConf.to_object(config) == {"x": [text]}


def test_the_class_of_lm_eval_takes_no_code_from_a_pattern(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("lm_eval")
    from duo_id.lm_eval.model import _settings

    save_pattern(
        HeadPattern(SCORES, 4, 60, provenance={"settings": {"model": TINY | {"trust_remote_code": True}}}), tmp_path
    )
    settings = _settings(None, load_pattern(tmp_path), "auto")
    assert (settings.id, settings.trust_remote_code) == ("tiny", False)
    assert "--model_args heads names: tiny" in capsys.readouterr().out
    provenance = {"settings": {"model": TINY | {"name": TEXT}}}
    assert _settings(None, HeadPattern(SCORES, 4, 60, provenance=provenance), "auto").name == TEXT
    provenance = {"settings": {"model": {"id": "x", "config": {"_attn_implementation": "someone/kernels"}}}}
    with pytest.raises(UserError, match=r"--model_args heads: .*_attn_implementation"):
        _settings(None, HeadPattern(SCORES, 4, 60, provenance=provenance), "auto")


class Unpickled:
    """Writes the marker when it is read by pickle."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return Path.write_text, (self.marker, "code ran")


def stranger(folder: Path, *overrides: str) -> str:
    """A run folder that arrived with the settings of these overrides; nothing in it has been computed yet."""
    return arriving(folder, composed("train", *QUICKER, *overrides, folder=folder))


def composed(name: str, *overrides: str, folder: Path) -> Any:
    """The plain values that Hydra composes, checked by nobody."""
    configs: dict[str, Any] = {"logger": {}}

    def read(config: DictConfig) -> None:
        configs.update(OmegaConf.to_container(config, resolve=True))

    where = f"hydra.run.dir={folder / 'stranger'}"
    finished = run_command(name, *overrides, where, folder=folder, command=read)
    assert finished.status == 0, finished.output
    return configs


def arriving(folder: Path, settings: Any) -> str:
    """A run folder that arrived with these settings."""
    (folder / "stranger").mkdir(exist_ok=True)
    (folder / "stranger" / "settings.json").write_text(json.dumps({"settings": settings, "before": {}}))
    return f"resume={folder / 'stranger'}"


# What a stranger's run says, and whether it works where the user types it: then it would have worked unchecked too.
Exploit = tuple[Callable[[Path, Path], list[str]], bool]
EXPLOITS: dict[str, Exploit] = {
    "our-own-writer": (
        lambda folder, marker: [
            "method.optimizer._target_=duo_id.common.files.write_text",
            f"+method.optimizer.text={marker}",
        ],
        False,  # it would write to a file named like the gates
    ),
    "our-own-writer-as-callback": (
        lambda folder, marker: [
            f"+trainer.callbacks=[{{_target_: duo_id.common.files.write_text, path: {marker}, text: code}}]"
        ],
        True,
    ),
    "our-own-writer-as-profiler": (
        lambda folder, marker: [
            f"+trainer.profiler={{_target_: duo_id.common.files.write_text, path: {marker}, text: x}}"
        ],
        True,
    ),
    "deep-inside": (
        lambda folder, marker: [
            "+method.optimizer.betas=[0.9,0.9]",
            f"+logger.csv.prefix={{_target_: duo_id.common.files.write_text, path: {marker}, text: code}}",
        ],
        True,
    ),
    "pickle": (
        lambda folder, marker: [
            f"+trainer.callbacks=[{{_target_: torch.load, f: {folder}/theirs.pickle, weights_only: false}}]"
        ],
        True,
    ),
    "hub": (
        lambda folder, marker: [
            f"+trainer.callbacks=[{{_target_: torch.hub.load, repo_or_dir: {folder}, model: theirs, source: local}}]"
        ],
        True,
    ),
    "partial": (
        lambda folder, marker: [
            f"+trainer.callbacks=[{{_target_: duo_id.common.files.write_text, _partial_: true, path: {marker}}}]"
        ],
        False,
    ),
    "partial-in-a-callback": (
        lambda folder, marker: [
            "+trainer.callbacks=[{_target_: lightning.pytorch.callbacks.LambdaCallback, on_train_start: {_target_: "
            f"duo_id.common.files.write_text, _partial_: true, path: {marker}}}}}]"
        ],
        False,
    ),
    "partial-of-a-class": (lambda folder, marker: ["+method.optimizer._partial_=true"], False),
    "arguments-of-a-class": (lambda folder, marker: ["+method.optimizer._args_=[1]"], False),
    "functools": (
        lambda folder, marker: [f"+logger.more={{_target_: functools.partial, _args_: [os.system, 'touch {marker}']}}"],
        False,
    ),
    "hydra": (
        lambda folder, marker: [
            "+logger.more={_target_: hydra.utils.instantiate, config: {_target_: duo_id.common.files.write_text, "
            f"path: {marker}, text: code}}}}"
        ],
        False,
    ),
    "shell": (lambda folder, marker: [f"+logger.more={{_target_: os.system, command: 'touch {marker}'}}"], False),
    "trainer": (
        lambda folder, marker: ["trainer._target_=duo_id.common.files.write_text", f"+trainer.path={marker}"],
        False,
    ),
    "module-beside-the-run": (
        lambda folder, marker: ["+trainer.callbacks=[{_target_: stranger_code.Callback}]"],
        True,
    ),
    "objective": (lambda folder, marker: ["method.objective=stranger_code.OBJECTIVE"], True),
    "objective-with-a-weight": (lambda folder, marker: ["method.objective={kl:1,stranger_code.OBJECTIVE:1}"], True),
    "repository": (
        lambda folder, marker: ["model=hub", f"model.id={folder / 'repository'}", "+model.trust_remote_code=true"],
        True,
    ),
    "repository-by-another-name": (
        lambda folder, marker: ["model=hub", f"model.id={folder}", "++model={trust_remote_code: true}"],
        False,
    ),
    "kernels": (lambda folder, marker: ["+model.architecture.attn_implementation=someone/kernels"], False),
    "checkpoint-in-the-folder-one-works-in": (
        lambda folder, marker: [
            "+trainer.callbacks=[{_target_: lightning.pytorch.callbacks.ModelCheckpoint, every_n_train_steps: 1, "
            "dirpath: marker}]"
        ],
        True,
    ),
    "our-own-callback": (
        lambda folder, marker: ["+trainer.callbacks=[{_target_: duo_id.train.history.GateHistory, run: marker}]"],
        True,
    ),
    "our-own-checkpoints": (
        lambda folder, marker: [
            "+trainer.callbacks=[{_target_: duo_id.train.checkpoints.LastCheckpoint, run: marker, seconds: 0}]"
        ],
        True,
    ),
    "name-of-a-checkpoint": (
        lambda folder, marker: [
            "+trainer.callbacks=[{_target_: lightning.pytorch.callbacks.ModelCheckpoint, filename: last}]"
        ],
        False,
    ),
    "argument-that-may-be-a-path": (
        lambda folder, marker: [
            "+trainer.callbacks=[{_target_: lightning.pytorch.callbacks.EarlyStopping, monitor: a, mode: a/b}]"
        ],
        False,
    ),
    "logger-in-the-folder-one-works-in": (
        lambda folder, marker: ["logger=wandb", "logger.wandb.offline=true", "+logger.wandb.dir=marker"],
        False,
    ),
    "checkpoint-elsewhere": (
        lambda folder, marker: [
            "+trainer.callbacks=[{_target_: lightning.pytorch.callbacks.ModelCheckpoint, every_n_train_steps: 1, "
            f"dirpath: {marker}}}]"
        ],
        True,
    ),
    "checkpoint-above": (
        lambda folder, marker: [
            "+trainer.callbacks=[{_target_: lightning.pytorch.callbacks.ModelCheckpoint, every_n_train_steps: 1, "
            "dirpath: a/../marker}]"
        ],
        True,
    ),
    "log-above": (lambda folder, marker: ["logger.csv.name=../marker"], True),
    "another-server": (
        lambda folder, marker: ["logger=wandb", "+logger.wandb.settings={base_url: 'https://example.com'}"],
        False,
    ),
}


@pytest.fixture
def arrived(tmp_path: Path, marker: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with everything that exploits point at; modules are found there, as where Python was started."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(__import__("sys").modules, "stranger_code", raising=False)
    (tmp_path / "theirs.pickle").write_bytes(pickle.dumps(Unpickled(marker)))
    (tmp_path / "hubconf.py").write_text(TEMPLATE.format(marker=str(marker)) + "def theirs(): pass\n")
    (tmp_path / "stranger_code.py").write_text(TEMPLATE.format(marker=str(marker)))
    repository(tmp_path / "repository", marker)
    return tmp_path


@pytest.mark.parametrize("name", EXPLOITS)
def test_a_strangers_run_runs_nothing_and_names_the_override(name: str, arrived: Path, marker: Path) -> None:
    overrides = EXPLOITS[name][0](arrived, marker)
    finished = run_command("train", stranger(arrived, *overrides), folder=arrived)
    assert not marker.exists()
    assert f"resume={arrived / 'stranger'}: its saved " in finished.error
    named = re.search(r"its saved ([a-z_]+[.][a-z_]+)", finished.error)
    assert named, finished.error
    assert any(override.lstrip("+").startswith((named[1], named[1].partition(".")[0] + "=")) for override in overrides)
    assert "give this setting again" in finished.error
    assert SECRET not in finished.output


@pytest.mark.parametrize("name", [name for name, (_, works) in EXPLOITS.items() if works])
def test_what_the_user_types_again_is_done(name: str, arrived: Path, marker: Path) -> None:
    """This also shows that the exploits are none in name alone."""
    overrides = EXPLOITS[name][0](arrived, marker)
    finished = run_command("train", stranger(arrived, *overrides), *overrides, folder=arrived)
    assert "its saved" not in finished.output
    assert marker.exists(), finished.output


def test_typing_one_override_again_vouches_for_no_other(arrived: Path, marker: Path) -> None:
    first = "+trainer.callbacks=[{_target_: stranger_code.Callback}]"
    second = f"+trainer.profiler={{_target_: duo_id.common.files.write_text, path: {marker}, text: x}}"
    finished = run_command("train", stranger(arrived, first, second), first, folder=arrived)
    assert "its saved trainer.profiler._target_=duo_id.common.files.write_text" in finished.error
    assert not marker.exists()


def test_a_strangers_evaluation_runs_no_code_of_a_repository(arrived: Path, marker: Path) -> None:
    heads = pattern(arrived, TINY)
    saved = [heads, "model=hub", f"model.id={arrived / 'repository'}", "+model.trust_remote_code=true"]
    arriving(arrived, composed("evaluate", *saved, folder=arrived))
    (arrived / "stranger" / "scores.jsonl").write_text("")
    finished = run_command("evaluate", f"resume={arrived / 'stranger'}", folder=arrived)
    assert "its saved model.trust_remote_code=true" in finished.error
    assert not marker.exists()


@pytest.mark.parametrize(
    ("path", "text"),
    [
        (("model", "name"), TEXT),
        (("model", "config", "model_type"), TEXT),
        (("method", "optimizer", "foreach"), TEXT),
        (("step", "memory"), TEXT),
        (("seed",), TEXT),
        (("hydra",), {"searchpath": ["file:///"]}),
    ],
    ids=str,
)
def test_text_of_a_strangers_settings_is_no_interpolation(path: tuple[str, ...], text: Any, arrived: Path) -> None:
    settings = json.loads(Path(stranger(arrived)[7:], "settings.json").read_text())["settings"]
    inner = settings
    for key in path[:-1]:
        inner = inner.setdefault(key, {})
    inner[path[-1]] = text
    finished = run_command("train", arriving(arrived, settings), folder=arrived)
    assert finished.status == (0 if path[-1] in ("name", "foreach") else 2), finished.output
    written = [
        file.read_bytes().decode(errors="replace") for file in (arrived / "stranger").rglob("*") if file.is_file()
    ]
    for text in (finished.output, *written):
        assert SECRET not in text


@pytest.mark.parametrize("saved", ["[]", '{"seed": 0}', "3", '{"settings": {"seed": []}, "before": {}}', None])
def test_settings_that_are_none_are_one_line(saved: str | None, tmp_path: Path) -> None:
    (tmp_path / "stranger").mkdir()
    if saved is not None:
        (tmp_path / "stranger" / "settings.json").write_text(saved)
    finished = run_command("train", f"resume={tmp_path / 'stranger'}", folder=tmp_path)
    assert "resume=" in finished.error or "seed=" in finished.error


OWN = {
    "optimizer": ["method.optimizer._target_=torch.optim.SGD"],
    "another-method": ["method=duo", "method.lr=0.1"],
    "callbacks": ["+trainer.callbacks=[{_target_: lightning.pytorch.callbacks.LearningRateMonitor}]"],
    "callback-with-words": [
        "+trainer.callbacks=[{_target_: lightning.pytorch.callbacks.EarlyStopping, monitor: train/loss, mode: min}]"
    ],
    "checkpoints-in-the-run": [
        "+trainer.callbacks=[{_target_: lightning.pytorch.callbacks.ModelCheckpoint, dirpath: null, save_last: true}]"
    ],
    "loggers": ["logger=wandb", "logger.wandb.offline=true"],
    "no-logger": ["~logger"],
    "prior": ["method@method.prior=saliency", "method.prior.samples=1"],
    "weights": ["method.objective={kl:1,next_token:0.1}"],
    "shape": ["model.architecture.hidden_size=64", "+model.config.sliding_window=null"],
    "file": ["data/haystack=file", "data.haystack.path=/somewhere/text.txt"],
    "experiment": ["experiment=smollm2"],
}


@pytest.mark.parametrize("case", OWN)
def test_a_run_of_ones_own_is_resumed_as_it_was(case: str, tmp_path: Path) -> None:
    asked = [*QUICKER, *OWN[case]]
    wanted = settings_of("train", TrainSettings, *asked, f"hydra.run.dir={tmp_path / 'stranger'}", folder=tmp_path)
    configs: list[Any] = []

    def read(config: Any) -> None:
        from duo_id.common import cli
        from duo_id.train.fitting import train_settings

        configs.append(train_settings(cli.start_run(config)[0]))

    finished = run_command("train", stranger(tmp_path, *OWN[case]), folder=tmp_path, command=read)
    assert finished.status == 0, finished.output
    configs[0].resume = None
    assert configs[0] == wanted


@pytest.mark.parametrize(
    ("target", "role", "allowed"),
    [
        ("lightning.Trainer", "trainer", True),
        ("lightning.pytorch.callbacks.EarlyStopping", "callback", True),
        ("lightning.pytorch.loggers.WandbLogger", "logger", True),
        ("lightning.pytorch.strategies.DDPStrategy", "strategy", True),
        ("torch.optim.AdamW", "optimizer", True),
        ("torch.optim.adamw.AdamW", "optimizer", True),
        ("lightning.pytorch.callbacks.model_checkpoint.ModelCheckpoint", "callback", True),
        ("duo_id.train.tracking.GateTracking", "callback", False),
        ("duo_id.train.history.GateHistory", "callback", False),
        ("duo_id.train.checkpoints.LastCheckpoint", "callback", False),
        ("lightning.pytorch.core.hooks.Callback", "callback", False),
        ("torch.optim.AdamW", "callback", False),
        ("torch.optim.lr_scheduler.LambdaLR", "optimizer", False),
        ("torch.load", "optimizer", False),
        ("duo_id.common.files.write_text", "callback", False),
        ("duo_id.train.tracking.Path.write_text", "callback", False),
        ("lightning.pytorch.callbacks.sys.exit", "callback", False),
        ("duo_id.nosuch.Callback", "callback", False),
        ("duo_identity.Callback", "callback", False),
        ("lightning.pytorch.trainer.trainer.Trainer.from_argparse_args", "trainer", False),
        ("", "callback", False),
    ],
)
def test_which_classes_the_files_of_a_run_may_name(target: str, role: str, allowed: bool) -> None:
    assert is_allowed_class(target, role) is allowed


def test_nothing_is_imported_to_look_a_class_up(arrived: Path, marker: Path) -> None:
    (arrived / "duo_id").mkdir()
    assert not is_allowed_class("stranger_code.Callback", "callback")
    assert not is_allowed_class("torch.optim.stranger_code.SGD", "optimizer")
    assert not marker.exists()


def test_evaluation_settings_of_a_baseline_are_not_interpolated(tmp_path: Path) -> None:
    from duo_id.benchmark.efficiency import read_baseline
    from duo_id.benchmark.settings import BenchmarkSettings

    ask = ["task=train_step", "model=tiny", "context=[1024]", f"compare={tmp_path}"]
    settings = settings_of("benchmark", BenchmarkSettings, *ask, folder=tmp_path)
    recorded = plain(settings)
    recorded["model"]["architecture"]["hidden_size"] = TEXT
    results = {"rows": [], "device": "CPU", "model": {"name": "tiny"}, "settings": recorded}
    (tmp_path / "results.json").write_text(json.dumps(results))
    with pytest.raises(UserError) as raised:
        read_baseline(settings, torch.device("cpu"), "CPU", 1)
    assert TEXT in str(raised.value)
    assert SECRET not in str(raised.value)


def test_settings_with_text_that_looks_like_an_interpolation_are_written_as_they_are() -> None:
    assert plain(ModelSettings(id=TEXT, name="${"))["id"] == TEXT
