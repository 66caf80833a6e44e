"""Bad command lines end in one line that names the override: no traceback, no hang, no silence."""

from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from itertools import islice
from pathlib import Path

import pytest

from tests.faults import places, settings
from tests.faults.command_lines import Line, command_line_trials, command_lines, drawn, judged, tried
from tests.faults.worker import Ended, Worker

SHORT = 24  # lines of the short part


def cheap() -> Iterator[Line]:
    """Lines that are refused, that no command has to run for first, and for which lm-eval does not read all its tasks.

    `tests/lm_eval/test_model.py` has mistakes of its command.
    """
    for line in drawn(0, 10**9):
        slow = line.module == "duo_id.lm_eval" or any(name in " ".join(line.bad) for name in places.MADE)
        if line.refused and not slow:
            yield line


@pytest.mark.parametrize("line", list(islice(cheap(), SHORT)), ids=lambda line: line.name)
def test_a_bad_line_is_refused(line: Line, place: Worker, made: Path, tmp_path: Path) -> None:
    _, typed, outcome, detail = tried(line, place, made, tmp_path)
    assert outcome == "refused", f"{typed}\n{detail}"


@pytest.mark.slow
def test_five_hundred_bad_lines() -> None:
    failures = [trial for trial in command_line_trials(0, 500) if trial[2] not in ("refused", "ran")]
    assert not failures, "\n".join("\n  ".join(trial) for trial in failures)


def test_a_seed_draws_the_same_lines_again() -> None:
    assert list(drawn(3, 200)) == list(drawn(3, 200))
    assert list(drawn(3, 200)) != list(drawn(4, 200))


def test_a_large_draw_is_all_there_is_each_once() -> None:
    lines = list(drawn(0, 10**9))
    assert len(lines) == sum(map(len, command_lines().values()))
    assert len(set(lines)) == len(lines)


def keys(schema: type, above: str = "") -> Iterator[str]:
    """The overrides of a class of settings."""
    for item in fields(schema):
        name = f"{above}{item.name}"
        inner = item.type
        if isinstance(inner, type) and is_dataclass(inner):
            yield from keys(inner, f"{name}.")
        else:
            yield name


def test_every_setting_is_tried() -> None:
    from duo_id.benchmark.settings import BenchmarkSettings
    from duo_id.data.settings import DataGenSettings
    from duo_id.evaluate.settings import EvaluateSettings
    from duo_id.methods.settings import METHODS
    from duo_id.train.settings import TrainSettings

    tried = {
        TrainSettings: settings.TRAIN | settings.TRAINER,
        EvaluateSettings: settings.EVALUATE,
        BenchmarkSettings: settings.BENCHMARK,
        DataGenSettings: settings.DATA_GEN,
    }
    for schema, domains in tried.items():
        known = {key.lstrip("+") for key in domains}
        missing = {
            key
            for key in keys(schema)
            if not key.startswith("method.") and not any(f"{one}.".startswith(f"{key}.") for one in known)
        }
        assert not missing, schema
    known = {key.lstrip("+") for domains in settings.METHODS.values() for key in domains}
    assert {f"method.{item.name}" for method in METHODS.values() for item in fields(method)} <= known


@pytest.mark.parametrize(
    ("status", "output", "outcome"),
    [
        (2, "error: seed=-1 must lie in [0, 2^32)\n", "refused"),
        (2, "warning: something\n\x1b[1;31merror:\x1b[0m seed=-1\n", "refused"),
        (2, "error: data.seed=-1\n", "blames another"),
        (2, "error: seed_of=-1\n", "blames another"),
        (2, "error: seed=-1\nand more\n", "traceback"),
        (2, "error: a\nerror: seed\n", "traceback"),
        (2, "", "traceback"),
        (1, "Traceback (most recent call last):\nValueError: seed\n", "traceback"),
        (1, "error: seed\n", "traceback"),
        (-11, "", "traceback"),
        (None, "", "hang"),
        (0, "", "silent"),
    ],
)
def test_what_counts_as_refused(status: int | None, output: str, outcome: str) -> None:
    assert judged(Ended(status, output), ["seed"], refused=True)[0] == outcome


def test_a_group_and_its_setting_may_stand_apart() -> None:
    told = Ended(2, "error: model.config does not describe a model: its hidden_size is abc\n")
    assert judged(told, ["model.config.hidden_size"], refused=True)[0] == "refused"
    assert judged(told, ["model.config.vocab_size"], refused=True)[0] == "blames another"


def test_the_worker_tells_how_a_trial_ended(place: Worker, tmp_path: Path) -> None:
    assert place.call("sys:exit", 3, cwd=tmp_path).status == 3
    assert place.call("os:abort", cwd=tmp_path).status == -6
    assert "Traceback" in place.call("os:chdir", "not/there", cwd=tmp_path).output
    ended = place.call("signal:pause", cwd=tmp_path, seconds=0.1)
    assert ended.status is None
    assert "Fatal Python error" in ended.output
    assert place.call("builtins:print", "☃", cwd=tmp_path) == Ended(0, "☃\n")
