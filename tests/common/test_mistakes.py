"""What the libraries' errors become: one line that names the override."""

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from omegaconf import DictConfig, OmegaConf

from duo_id.common.errors import UserError
from duo_id.common.mistakes import describe_error, instantiate, shell_quoted
from tests.support.commands import QUICK, run_command

STEPS = ["task=train_step", "model=tiny", "context=60", "sink_size=4", "recent_size=8"]
DIVISION = {"_target_": "operator.truediv"}


def raised(call: Callable[[], Any]) -> BaseException:
    try:
        call()
    except Exception as error:
        return error
    raise AssertionError("nothing was wrong")


@pytest.mark.parametrize(
    ("command", "overrides", "message"),
    [
        ("train", ["trainer.devices=abc"], "trainer.devices=abc: `devices`"),
        (
            "train",
            ["model.architecture.vocab_size=100"],
            "model.architecture.vocab_size=100: random weights use a byte tokenizer",
        ),
        (
            "train",
            ["model.architecture.num_key_value_heads=3"],
            "4 query heads do not divide among 3 KV heads",
        ),
        ("train", ["method=search", "method.start=nowhere"], "method.start=nowhere: no head pattern"),
        (
            "train",
            ["method=search", "method.swap_at=0.5", "method.max_swaps=1", "repeats=2"],
            "repeats=2: method.swap_at",
        ),
        ("train", ["step.memory=0GiB"], "step.memory: a step of"),
        ("train", [f"step.memory={'9' * 320}GiB"], "choose auto, outputs, least, or a budget such as 60GiB"),
        ("train", ["trainer.accelerator=nosuch"], "trainer.accelerator=nosuch: You selected an invalid accelerator"),
        ("train", ["trainer._target_=os.getcwd"], "trainer._target_=os.getcwd: posix.getcwd() takes no keyword"),
        (
            "train",
            ["trainer._target_=builtins.dict"],
            "trainer._target_=builtins.dict is not a Trainer: use lightning.",
        ),
        ("train", ["+method.optimizer.betas=x"], "error: method.optimizer.betas=x: '<=' not supported"),
        ("train", ["method.optimizer.lr=null"], "error: method.optimizer.lr=None: '<=' not supported"),
        (
            "train",
            ["+model.config.rope_theta=x"],
            "model.architecture (model_type=llama) with model.config.rope_theta=x",
        ),
        ("train", ["+model.config.hidden_act=nope"], "with model.config.hidden_act=nope does not describe a model: "),
        (
            "train",
            ["+model.config.rope_scaling={rope_type: yarn, factor: x}"],
            "model.config.rope_scaling={'rope_type'",
        ),
        *(
            ("train", [override], f"error: {override}: Hydra cannot compose this")
            for override in (
                "trainer=null",
                "data=null",
                "logger=null",
                "model=1.5",
                "data/haystack=null",
                "experiment=1",
            )
        ),
        ("train", ["+trainer.nosuch=1"], "trainer.nosuch=1: there is no such setting"),
        ("train", ["+method.optimizer.nosuch=1"], "method.optimizer.nosuch=1: AdamW.__init__() got an unexpected"),
        ("train", ["+logger.csv.nosuch=1"], "logger.csv.nosuch=1: CSVLogger.__init__() got an unexpected"),
        ("train", ["model=hub"], "model.id: its value is missing, give model.id=VALUE"),
        ("train", ["data=mixture", "data.mixture=[passkey]"], "=[passkey]: data.mixture is a mapping, such as {key:"),
        ("train", ["method.budgets=0.5"], "method.budgets=[0.5] must be two fractions"),
        ("train", ["sparsity={a:1}"], "sparsity={a:1}: sparsity is a list, such as [value]"),
        ("train", ["method=nestd"], "method=nestd: choose one of attention_profile, duo, nested, "),
        ("train", ["method=nestd"], ", did you mean nested?"),
        ("train", ["experiment=bset"], ", did you mean best?"),
        ("train", ["method.lrr=1"], "method.lrr=1: there is no such setting, did you mean method.lr?"),
        ("train", ["trainr.max_steps=1"], "trainr.max_steps=1: there is no such setting, did you mean trainer?"),
        (
            "train",
            ["data.haystack.sorce=x"],
            "data.haystack.sorce=x: there is no such setting, did you mean data.haystack.so",
        ),
        ("train", ["modle=tiny"], "modle=tiny: there is no such setting, did you mean model?"),
        ("train", ["trainer.min_steps=1"], "did you mean trainer.max_steps? to add it, give +trainer.min_steps=1"),
        (
            "train",
            ["model.config.sliding_window=null"],
            "no such setting, to add it, give +model.config.sliding_window=null",
        ),
        ("train", ["model.id="], "error: model.id= must be a non-empty string"),
        ("benchmark", ["trainer.devices=abc"], "trainer.devices=abc: `devices`"),
        ("benchmark", ["+trainer.max_steps=3"], "trainer.max_steps: benchmarks have no trainer"),
        ("benchmark", ["blend={teacher:1}"], "blend={teacher:1}: blend is a list, such as [value]"),
        ("benchmark", ["blend=pupil"], "blend=pupil: choose one of student, detached, teacher"),
    ],
)
def test_a_librarys_error_names_the_override(command: str, overrides: list[str], message: str, tmp_path: Path) -> None:
    valid = {"train": QUICK, "benchmark": STEPS}[command]
    assert message in run_command(command, *valid, *overrides, folder=tmp_path).error


@pytest.mark.parametrize("override", ["foo.bar=1", "method.zzz=1", "zzz=1"])
def test_a_plus_is_advised_only_where_it_helps(override: str, tmp_path: Path) -> None:
    for sign in ("", "+"):
        error = run_command("train", f"{sign}{override}", folder=tmp_path).error
        assert error.endswith(": there is no such setting")


def test_what_a_settings_group_describes_is_built() -> None:
    assert instantiate("group", DIVISION, 1, 4) == 0.25
    assert instantiate("group", {"_target_": "builtins.dict", "size": 3}, more=5) == {"size": 3, "more": 5}


def test_an_error_that_names_no_setting_is_put_down_to_one() -> None:
    with pytest.raises(UserError, match=r"^group\._target_=operator\.truediv: division by zero$") as error:
        instantiate("group", DIVISION, 1, 0)
    assert isinstance(error.value.__cause__, ZeroDivisionError)
    with pytest.raises(UserError, match=r"^group\.devices=None: division by zero$"):
        instantiate("group", DIVISION, 1, 0, default_key="devices")
    with pytest.raises(UserError, match=r"^group\._target_=nosuch\.name: Error loading 'nosuch\.name'"):
        instantiate("group", {"_target_": "nosuch.name"})


def test_our_own_error_is_found_inside_an_interpolation() -> None:
    def refuse() -> None:
        raise UserError("resume=nowhere:\n there is nothing")

    OmegaConf.register_new_resolver("refuse", refuse, replace=True)
    error = raised(lambda: OmegaConf.create({"value": "${refuse:}"}).value)
    assert describe_error(error) == "resume=nowhere: there is nothing"


def test_an_error_without_words_is_its_name() -> None:
    assert describe_error(OSError()) == "OSError"
    assert describe_error(OSError("two\n\n lines")) == "two lines"


PUBLISHED = "attn_patterns/Llama-3-8B-Instruct-Gradient-1048k/lr=0.02-reg=0.05-ctx=1000_32000-multi_passkey10"
ODD = ["a b(c", 'it\'s "b"=c', "ends=in\\", 'back\\"quote=', "back\\slash=", "ü=ß"]


@pytest.mark.parametrize(
    ("command", "key", "path"),
    [
        *(("train", "resume", path) for path in (PUBLISHED, f"./{PUBLISHED}/", *ODD)),
        *(("train", "+method.start", path) for path in (PUBLISHED, ODD[1])),
        *(("evaluate", "heads", path) for path in (PUBLISHED, ODD[2])),
        *(("evaluate", "+patterns.other", path) for path in (PUBLISHED, ODD[3])),
        *(("benchmark", "heads", path) for path in (PUBLISHED, ODD[5])),
    ],
)
def test_the_quotes_that_are_shown_are_those_that_hydra_needs(
    command: str, key: str, path: str, tmp_path: Path
) -> None:
    """What the shell makes of the line that is shown goes through Hydra, and comes out as what was typed."""
    method = ["method=search"] if key == "+method.start" else []
    typed = run_command(command, *method, f"{key}={path}", folder=tmp_path)
    line, _, shown = typed.error.partition(" needs quotes that reach Hydra: ")
    assert line == f"error: {key}={path}: the value of {key}"
    (override,) = shlex.split(shown)
    configs: list[Any] = []

    def read(config: DictConfig) -> None:
        configs.append(OmegaConf.select(config, key.lstrip("+")))

    finished = run_command(
        command, *method, override, f"hydra.run.dir={tmp_path / 'run'}", folder=tmp_path, command=read
    )
    assert finished.status == 0, finished.output
    assert configs == [path]


def test_published_heads_are_read_by_the_line_that_is_shown(tmp_path: Path) -> None:
    folder = tmp_path / PUBLISHED
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"sink_size": 4, "recent_size": 60}')
    (folder / "full_attention_heads.tsv").write_text("0.1\t0.2\n" * 5)
    overrides = ["model=tiny", "context=[128]", "task=decode", f"hydra.run.dir={tmp_path / 'run'}"]
    typed = run_command("benchmark", *overrides, f"heads={PUBLISHED}", folder=tmp_path)
    quoted = run_command("benchmark", *overrides, *shlex.split(typed.error.rpartition(": ")[2]), folder=tmp_path)
    assert "5 layers x 2 KV heads" in quoted.error, "which the tiny model does not have"


@pytest.mark.parametrize("override", ["method.lr=[", "method.optimizer={a"])
def test_what_no_quotes_mend_shows_none(override: str, tmp_path: Path) -> None:
    assert f"{override}: Hydra cannot parse it (" in run_command("train", override, folder=tmp_path).error


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("best", "error: best: settings are given as KEY=VALUE, such as experiment=best"),
        ("--resume", "error: --resume: there is no such option, settings are given as resume=VALUE"),
        (
            "--experiment=best",
            "error: --experiment=best: there is no such option, settings are given as experiment=best",
        ),
    ],
    ids=["word", "option", "option with a value"],
)
def test_what_is_no_setting_is_one_line(argument: str, message: str, tmp_path: Path) -> None:
    assert run_command("train", argument, folder=tmp_path).error == message


@pytest.mark.parametrize(
    ("path", "typed"),
    [("runs/1", "resume=runs/1"), ("a=b", "'resume=\"a=b\"'"), ("two words", "'resume=two words'")],
)
def test_a_hint_has_quotes_where_it_needs_some(path: str, typed: str) -> None:
    assert shell_quoted(f"resume={path}") == typed


def test_causes_that_form_a_circle_come_to_an_end() -> None:
    first, second = ImportError("no module"), KeyError("nothing")
    first.__cause__, second.__cause__ = second, first
    assert describe_error(first) == "no module"
