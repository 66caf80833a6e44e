"""Every setting of every command under values that are none: one line that names it, unless it is listed here."""

import copy
import inspect
import math
from collections.abc import Iterator
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

import lightning
import pytest
from omegaconf import OmegaConf

from duo_id.common.config import parse
from duo_id.common.errors import UserError
from duo_id.methods.settings import METHODS
from duo_id.train.fitting import train_settings
from duo_id.train.settings import TrainSettings
from duo_id.train.trainer import RESERVED, TrainerSettings
from tests.support.commands import QUICK, run_command
from tests.train.test_settings import NEEDED, SCHEMAS

VALUES: dict[str, Any] = {
    "nan": math.nan,
    "inf": math.inf,
    "negative": -1,
    "zero": 0,
    "fraction": 1.5,
    "huge": 10**22,
    "huge-float": 1e22,
    "thousands-of-digits": 10**5000,
    "true": True,
    "null": None,
    "empty": "",
    "word": "nosuch",
    "two-lines": "a\nb",
    "list": [1],
    "empty-list": [],
    "list-in-a-list": [[0.5]],
    "mapping": {"nosuch": 1},
    "empty-mapping": {},
}
TEXTS = """
data.haystack.id data.haystack.name data.haystack.path data.haystack.revision data.haystack.sha256 data.haystack.split
data.haystack.text_key data.path data.self_path data.self_sha256 data.task heads model.id model.name model.revision
model.wheel out resume tasks trainer.model_registry
"""  # any word is one, a number too
FLAGS = """
beside chat_template compile data.self_chat generate model.trust_remote_code peers profile step.compile
step.cuda_graphs step.shard trainer.barebones trainer.benchmark trainer.detect_anomaly trainer.deterministic
trainer.enable_autolog_hparams trainer.enable_model_summary trainer.enable_progress_bar trainer.fast_dev_run
trainer.inference_mode trainer.sync_batchnorm
"""
ACCEPTED = {
    "nan": TEXTS,
    "inf": TEXTS,
    "huge": TEXTS,
    "huge-float": TEXTS,
    "negative": f"{TEXTS} trainer.devices trainer.num_sanity_val_steps",
    "zero": f"""{TEXTS} {FLAGS}
        data.curriculum data.depth_min data.num_workers data.self_seed data.self_temperatures data.text_skip
        evict_split n n_test n_validation random_masks seed sink_size sparsity warmup write checkpoint_seconds
        comparison.random_masks comparison.validation_samples method.sink_size method.budgets method.floor
        method.initial method.reg_weight method.target_rise method.warmup method.at method.max_swaps method.samples
        trainer.limit_val_batches trainer.num_sanity_val_steps trainer.reload_dataloaders_every_n_epochs""",
    "fraction": f"""{TEXTS} checkpoint_seconds data.self_temperatures method.lr method.multiplier_lr
        method.prior_weight method.reg_weight method.temperature trainer.gradient_clip_val""",
    "true": FLAGS,
    "null": """batch_tokens compare compile data.haystack.id data.haystack.name data.haystack.path
        data.haystack.revision data.haystack.sha256 data.length data.length_max data.path data.self_chat
        data.self_path data.self_sha256 data.text_tokens first_context heads
        model.revision model.weights model.wheel resume method.prior method.target_sparsity method.batch_tokens
        method.start method.swap_at trainer.benchmark trainer.callbacks trainer.check_val_every_n_epoch
        trainer.deterministic trainer.enable_model_summary trainer.enable_progress_bar trainer.gradient_clip_algorithm
        trainer.gradient_clip_val trainer.limit_train_batches trainer.limit_val_batches trainer.model_registry
        trainer.num_sanity_val_steps trainer.profiler""",
    "empty": "model.name",
    "word": f"""{TEXTS} method.prior method.start trainer._target_ trainer.accelerator trainer.devices trainer.profiler
        trainer.strategy""",
    "list": """cache chunk_size context data.self_temperatures evict_split lengths sparsity tasks method.budgets
        method.levels trainer.devices""",
    "empty-list": "baselines cache evict method.levels shares spans trainer.callbacks",
    "mapping": "data.mixture model.architecture model.config patterns",
    "empty-mapping": "data data.haystack data.mixture model.config patterns step logger trainer",
}
METHOD = {"name": "duo", "sink_size": 16, "recent_size": 64}
ADAMW = {"_target_": "torch.optim.AdamW", "lr": 0.01}
OWN = {  # what a method needs for its values to be told apart
    "duo": {"optimizer": ADAMW},
    "nested": {"optimizer": ADAMW},
    "saliency": {"at": [0.5]},
}


def places(schema: Any, path: str = "") -> Iterator[str]:
    """The override of every setting within a schema."""
    if schema is TrainerSettings:
        yield from (f"{path}.{name}" for name in get_type_hints(schema))
    for name, kind in get_type_hints(schema).items() if is_dataclass(schema) else []:
        key = f"{path}.{name}".lstrip(".")
        yield key
        yield from places(kind, key)


CASES = {name: ("train" if name in METHODS else name, list(places(schema))) for name, schema in SCHEMAS.items()}
CASES |= {name: ("train", [f"method.{key}" for key in get_type_hints(schema)]) for name, schema in METHODS.items()}


def put(config: Any, key: str, value: Any) -> Any:
    """A copy with another value at a place."""
    config = inner = copy.deepcopy(config)
    *path, last = key.split(".")
    for name in path:
        inner = inner[name]
    inner[last] = value
    return config


def refusal(command: str, config: Any) -> str | None:
    """What a command says of a config that it does not take."""
    try:
        train_settings(config) if command == "train" else parse(SCHEMAS[command], config)
    except UserError as error:
        return str(error)
    return None


@pytest.fixture(scope="module")
def composed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The plain values of each command's config."""
    configs: dict[str, Any] = {}
    for name in SCHEMAS:

        def read(config: Any, name: str = name) -> None:
            configs[name] = OmegaConf.to_container(config, resolve=True)

        folder = tmp_path_factory.mktemp("composed")
        assert run_command(name, "model=tiny", *NEEDED.get(name, []), folder=folder, command=read).status == 0
    return configs


@pytest.mark.parametrize("kind", VALUES)
@pytest.mark.parametrize("name", CASES)
def test_a_value_that_is_none_is_one_line_that_names_its_setting(
    name: str, kind: str, composed: dict[str, Any]
) -> None:
    command, keys = CASES[name]
    config, accepted = composed[command], set()
    if name in METHODS:
        config = put(config, "method", METHOD | {"name": name} | OWN.get(name, {}))
    for key in keys:
        changed = put(config, key, VALUES[kind])
        if (message := refusal(command, changed)) is None:
            accepted.add(key)
        else:
            assert key in message
            assert "\n" not in message
            assert len(message) < 400
    assert accepted <= set(ACCEPTED.get(kind, "").split())


def test_what_is_listed_as_accepted_is_somewhere(composed: dict[str, Any]) -> None:
    all_keys = {key for _, keys in CASES.values() for key in keys}
    assert set(" ".join(ACCEPTED.values()).split()) <= all_keys


def test_every_argument_of_lightnings_trainer_is_taken_or_told() -> None:
    arguments = set(inspect.signature(lightning.Trainer.__init__).parameters) - {"self"}
    assert arguments - set(get_type_hints(TrainerSettings)) == set(RESERVED)


BAD = {  # overrides of train, and how the line begins
    "trainer.max_steps=10000000000000000000000": "trainer.max_steps=10000000000000000000000 must be at most 2147483648",
    "trainer.max_steps=1e22": "trainer.max_steps=1e+22 must be at most 2147483648",
    "model.architecture.model_type={}": "model.architecture.model_type={} must be a model type that",
    "model.architecture.hidden_size={}": "model.architecture.hidden_size={} must be a whole number, at least 1 and",
    "resume={}": "resume={}: give the folder of a run",
    "model=[[a]]": "model=[[a]]",
    "resume=???": "resume: its value is missing, give resume=VALUE",
    "hydra.run.dir=/dev/null": "hydra.run.dir=/dev/null is, or lies in, a file: give a folder",
    "trainer.max_steps=0": "trainer.max_steps=0 must be at least 1",
    "trainer.val_check_interval=0": "trainer.val_check_interval=0 must be at least 1",
    "trainer.log_every_n_steps=0": "trainer.log_every_n_steps=0 must be at least 1",
    "trainer.log_every_n_steps=abc": "trainer.log_every_n_steps=abc must be a whole number",
    "trainer.log_every_n_steps=nan": "trainer.log_every_n_steps=nan must be a",
    "trainer.log_every_n_steps=-1": "trainer.log_every_n_steps=-1 must be at least 1",
    "+trainer.gradient_clip_val=-1": "trainer.gradient_clip_val=-1 must be above 0",
    "+trainer.limit_train_batches=0": "trainer.limit_train_batches=0 must be at least 1",
    "+trainer.limit_val_batches=-1": "trainer.limit_val_batches=-1 must be a whole number of batches",
    "+trainer.limit_val_batches=1.5": "trainer.limit_val_batches=1.5 must be a whole number of batches",
    "+trainer.overfit_batches=2": "trainer.overfit_batches=2: leave it out",
    "trainer.num_sanity_val_steps=-2": "trainer.num_sanity_val_steps=-2 must be at least -1",
    "+trainer.detect_anomaly=maybe": "trainer.detect_anomaly=maybe must be true or false",
    "+trainer.deterministic=maybe": "trainer.deterministic=maybe: choose one of true, false, warn",
    "+trainer.max_stepz=1": "trainer.max_stepz=1: there is no such setting, did you mean trainer.max_steps?",
    "+method.learning=1": "method.learning=1: there is no such setting",
    "+data.haystack.pth=x": "data.haystack.pth=x: there is no such setting, did you mean data.haystack.path?",
    "checkpoint_seconds=inf": "checkpoint_seconds=inf must be a finite number",
    "checkpoint_seconds=nan": "checkpoint_seconds=nan must be a finite number",
    "logger.csv._target_=nope.X": "logger.csv._target_=nope.X: there is no such class",
    "logger.csv._target_=null": "logger.csv._target_=null must name a class",
    "method.reg_weight=inf": "method.reg_weight=inf must be a finite number",
    "method.objective={kl: inf}": "method.objective.kl=inf must be a positive weight",
    "method.objective={kl: nan}": "method.objective.kl=nan must be a positive weight",
    "method.penalty={l1: inf}": "method.penalty.l1=inf must be a positive weight",
    "method.lr=1e300": "method.lr=1e+300 must be at most 1000000000",
    "method.optimizer.lr=nan": "method.optimizer.lr=nan: ",
    "method.optimizer.weight_decay=-1": "method.optimizer.weight_decay=-1: ",
    "method.optimizer._target_=nope.X": "method.optimizer._target_=nope.X: ",
    "method.optimizer._target_=builtins.list": "method.optimizer._target_=builtins.list: ",
    "model.architecture.num_attention_heads=0": "model.architecture.num_attention_heads=0 must be a whole number",
    "model.architecture.num_key_value_heads=0": "model.architecture.num_key_value_heads=0 must be a whole number",
    "model.architecture.num_key_value_heads=3": "model.architecture.num_key_value_heads=3: 4 query heads do not",
    "model.architecture.num_hidden_layers=0": "model.architecture.num_hidden_layers=0 must be a whole number",
    "model.architecture.hidden_size=nan": "model.architecture.hidden_size=nan must be a whole number",
    "+model.config.num_attention_heads=0": "model.config.num_attention_heads=0 must be a whole number",
    "method.sink_size=1000000000000000000": "method.sink_size=1000000000000000000 must be at most 2147483648",
    "method.recent_size=1000000000000000000": "method.recent_size=1000000000000000000 must be at most 2147483648",
    "sparsity=[[0.5]]": "sparsity=[0.5] must be a number",
    "sparsity=true": "sparsity=true must be a number; such as",
    "seed=4294967296": "seed=4294967296 must be below 4294967296",
    "step.shard=7": "step.shard=7 must be true or false",
}


@pytest.mark.parametrize("override", BAD)
def test_a_bad_override_of_train_is_told_before_a_model_is_loaded(override: str, tmp_path: Path) -> None:
    refused = run_command("train", *QUICK, override, folder=tmp_path, command=train_settings)
    assert refused.error.startswith(f"error: {BAD[override]}")


@pytest.mark.parametrize(
    ("command", "override", "message"),
    [
        ("data_gen", "n=-1", "n=-1 must be at least 0"),
        ("data_gen", "n_validation=-1", "n_validation=-1 must be at least 0"),
        ("benchmark", "sink_size=1000000000000000000", "sink_size=1000000000000000000 must be at most"),
        ("benchmark", "sparsity=[[0.5]]", "sparsity=[0.5] must be a number"),
        ("evaluate", "sparsity=[[0.5]]", "sparsity=[0.5] must be a number"),
        ("evaluate", "lengths=[]", "lengths=[] must be a list of at least one value"),
        ("evaluate", "split=train", "split=train: choose one of development, test"),
    ],
)
def test_a_bad_override_of_the_other_commands_is_one_line(
    command: str, override: str, message: str, tmp_path: Path
) -> None:
    def read(config: Any) -> None:
        parse(SCHEMAS[command], config)

    refused = run_command(command, "model=tiny", *NEEDED.get(command, []), override, folder=tmp_path, command=read)
    assert refused.error.startswith(f"error: {message}")


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("sparsity=0.5", "sparsity", [0.5]),
        ("method.budgets=[0,1]", "method.budgets", [0.0, 1.0]),
        ("method.lr=1", "method.lr", 1.0),
        ("trainer.max_steps=1e2", "trainer.max_steps", 100),
        ("model.name=7", "model.name", "7"),
        ("step.compile=yes", "step.compile", True),
        ("data.length_max=null", "data.length_max", None),
        ("seed='5'", "seed", 5),
        ("logger.csv=null", "logger", {}),
        (
            "+trainer.callbacks={_target_: lightning.Callback}",
            "trainer.callbacks",
            [{"_target_": "lightning.Callback"}],
        ),
    ],
)
def test_what_people_type_is_understood(override: str, key: str, value: Any, tmp_path: Path) -> None:
    configs: list[Any] = []

    def read(config: Any) -> None:
        configs.append(train_settings(config))

    finished = run_command("train", *QUICK, override, folder=tmp_path, command=read)
    assert finished.status == 0, finished.output
    setting = configs[0]
    assert isinstance(setting, TrainSettings)
    for name in key.split("."):
        setting = setting[name] if isinstance(setting, dict) else getattr(setting, name)
    assert setting == value
    assert type(setting) is type(value)
