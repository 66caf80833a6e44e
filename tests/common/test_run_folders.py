"""Run folders from the command line: which they are, who has them, and what is kept in them."""

import errno
import os
import re
import shutil
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from duo_id.common import folders
from duo_id.common.folders import LOCK, lock_folder
from tests.common.test_folders import elsewhere
from tests.support.commands import QUICK, Finished, run_command
from tests.support.sweep_jobs import write_summary


@pytest.mark.parametrize("name", ["train", "evaluate", "benchmark"])
def test_runs_that_start_at_once_have_folders_of_their_own(name: str, tmp_path: Path) -> None:
    folders = []

    def command(_: DictConfig) -> None:
        folders.append(Path(HydraConfig.get().runtime.output_dir))

    for _ in range(2):
        now = f"hydra.run.dir=${{fresh_folder:{tmp_path}/now}}"
        assert run_command(name, now, folder=tmp_path, command=command).status == 0
    assert [path.name for path in folders] == ["now", "now-2"]
    config = (Path(__file__).parents[2] / "conf" / f"{name}.yaml").read_text()
    (line,) = re.findall(r"run:\n +dir: (.*)", config)
    assert line.startswith(("${run_folder:", "${fresh_folder:"))


def test_a_new_run_is_fresh_and_a_resumed_one_is_not(tmp_path: Path) -> None:
    folders = []

    def command(_: DictConfig) -> None:
        folders.append(Path(HydraConfig.get().runtime.output_dir).name)

    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "settings.json").write_text("{}")
    for resume in ("null", "null", tmp_path / "old"):
        where = f"hydra.run.dir='${{run_folder:${{resume}},settings.json,{tmp_path}/old}}'"
        finished = run_command("train", where, f"resume={resume}", folder=tmp_path, command=command)
        assert finished.status == 0, finished.output
    assert folders == ["old-2", "old-3", "old"]


OUTWARD = ["summary.json", "figures", "heads/heads.json", ".hydra/config.yaml", LOCK, "checkpoints"]


@pytest.mark.parametrize("name", OUTWARD)
def test_links_out_of_a_run_are_refused_before_anything_is_written(name: str, tmp_path: Path) -> None:
    """Whoever made the folder would decide what of this user's is written over."""
    precious = tmp_path / "precious"
    precious.write_text("precious")
    link = tmp_path / "run" / name
    link.parent.mkdir(parents=True)
    link.symlink_to(Path("..", *[".."] * name.count("/"), precious.name))
    (tmp_path / "run" / "settings.json").write_text("{}")
    before = sorted((tmp_path / "run").rglob("*"))
    for overrides in ([f"resume={link.parents[name.count('/')]}"], [], ["--multirun", "hydra.sweep.dir=run"]):
        error = run_command("train", *overrides, folder=tmp_path, command=pytest.fail).error
        assert f"{name} is a symbolic link out of " in error
        assert error.endswith("remove it, or replace it by its target")
    assert sorted((tmp_path / "run").rglob("*")) == before
    assert precious.read_text() == "precious"


def test_a_study_with_its_own_storage_has_no_links_either(tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep" / "multirun.yaml").symlink_to(tmp_path / "precious")
    where = ["--multirun", f"hydra.sweep.dir={tmp_path / 'sweep'}", "hydra/sweeper=optuna", "method.lr=interval(0.1,1)"]
    where += [f"hydra.sweeper.storage=sqlite:///{tmp_path / 'study.db'}", "hydra.sweeper.n_trials=1"]
    error = run_command("train", *where, folder=tmp_path, command=pytest.fail).error
    assert "multirun.yaml is a symbolic link out of " in error
    assert not (tmp_path / "precious").exists()


def test_a_run_folder_may_be_a_link_and_have_links_within(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    (disk / "wandb" / "run-1" / "logs").mkdir(parents=True)
    (disk / "wandb" / "latest-run").symlink_to("run-1")
    (disk / "wandb" / "run-1" / "logs" / "debug-core.log").symlink_to(tmp_path / "cache" / "core.log")  # wandb's own
    (tmp_path / "run").symlink_to(disk)
    assert run_command("train", folder=tmp_path, command=lambda _: None).status == 0


@pytest.mark.parametrize("value", ["", "' '", "/proc/x", "/dev/null/x", "/dev/null"])
@pytest.mark.parametrize("override", ["hydra.run.dir", "hydra.sweep.dir"])
def test_a_folder_that_is_none_is_named(override: str, value: str, tmp_path: Path) -> None:
    several = ["--multirun"] if override == "hydra.sweep.dir" else []
    finished = run_command("train", *several, f"{override}={value}", folder=tmp_path, command=pytest.fail)
    assert finished.error.startswith(f"error: {override}={value.strip(chr(39))}")
    assert "give a" in finished.error


def test_a_place_where_no_folder_can_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "outputs").write_text("a file where runs have their folders")
    now = "hydra.run.dir=${fresh_folder:outputs/now}"
    finished = run_command("train", now, folder=tmp_path, command=pytest.fail)
    assert finished.error.startswith("error: outputs/now cannot be created (")
    assert finished.error.endswith("): give another hydra.run.dir")


def test_a_second_run_in_a_folder_is_told_who_has_it(tmp_path: Path) -> None:
    def second() -> str:
        return run_command("train", *QUICK, folder=tmp_path).error

    with lock_folder(tmp_path / "run", "wait"):
        message = elsewhere(second)
    assert f"process {os.getpid()} on {socket.gethostname()} is working in this folder" in message
    assert message.endswith("wait until it ends, or give another hydra.run.dir")
    assert [path.name for path in (tmp_path / "run").iterdir()] == [LOCK]


def test_a_full_disk_is_told_with_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    message = f"error: [Errno 28] No space left on device: '{tmp_path / 'run'}'"
    assert run_command("train", folder=tmp_path, command=full).error == message
    monkeypatch.setattr(folders.os, "pwrite", full)
    assert run_command("train", folder=tmp_path, command=pytest.fail).error == message


def kept(folder: Path) -> list[str]:
    """The command line that is kept in a folder as Hydra has it."""
    return yaml.safe_load((folder / ".hydra" / "overrides.yaml").read_text())


def test_what_hydra_keeps_of_a_run_is_its_first_command_line(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "settings.json").write_text("{}")
    first, resumed = "seed=3", f"resume={tmp_path / 'run'}"
    for override in (first, resumed):
        assert run_command("train", override, folder=tmp_path, command=lambda config: None).status == 0
    assert kept(tmp_path / "run") == [first]


LEFT = {
    "train": ["heads/heads.json", "seed-1/heads/heads.json", "summary.json", "checkpoints/last.ckpt", "search.json"],
    "evaluate": ["scores.jsonl", "results.json"],
    "benchmark": ["results.json"],
}
CASES = [(name, result) for name, results in LEFT.items() for result in results]


def leave(result: str) -> Callable[[DictConfig], None]:
    """A command that leaves a result in its run folder."""

    def command(_: DictConfig) -> None:
        path = Path(HydraConfig.get().runtime.output_dir) / result
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}")

    return command


@pytest.mark.parametrize(("name", "result"), CASES, ids=[" ".join(case) for case in CASES])
def test_results_of_other_settings_are_not_replaced(name: str, result: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert run_command(name, "seed=1", folder=tmp_path, command=leave(result)).status == 0
    message = run_command(name, "seed=2", folder=tmp_path, command=pytest.fail).error
    assert message.startswith(f"error: {run / result} is of a run with other settings, and this one would replace it: ")
    resume = f", or resume={run} to continue that run" if name != "benchmark" else ""
    assert message.endswith(f"give another hydra.run.dir{resume}")
    assert kept(run) == ["seed=1"]
    assert run_command(name, "seed=1", folder=tmp_path, command=lambda _: None).status == 0, "with the same it may"
    shutil.rmtree(run / ".hydra")
    assert "replace" in run_command(name, "seed=1", folder=tmp_path, command=pytest.fail).error


def test_a_failed_run_that_left_no_results_may_be_mended(tmp_path: Path) -> None:
    assert run_command("train", "seed=1", folder=tmp_path, command=leave("settings.json")).status == 0
    assert run_command("train", "seed=2", folder=tmp_path, command=lambda _: None).status == 0


def test_jobs_of_a_sweep_do_not_replace_results_of_other_settings(tmp_path: Path) -> None:
    def sweep(seeds: str) -> Finished:
        where = ["--multirun", f"hydra.sweep.dir={tmp_path / 'sweep'}", f"seed={seeds}"]
        return run_command("train", *where, folder=tmp_path, command=lambda config: write_summary(config.seed))

    assert [sweep("1,2").status, sweep("1,2").status] == [0, 0]
    finished = sweep("1,3")
    assert finished.status == 2
    errors = [line for line in finished.output.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert "sweep/1/summary.json is of a run with other settings" in errors[0]
    assert f"give another hydra.sweep.dir, or resume={tmp_path / 'sweep' / '1'}" in errors[0]


def test_a_second_sweep_in_a_folder_is_told_who_has_it_and_starts_no_job(tmp_path: Path) -> None:
    sweep = ["--multirun", f"hydra.sweep.dir={tmp_path / 'sweep'}", "seed=0,1"]

    def second() -> str:
        return run_command("train", *sweep, folder=tmp_path, command=pytest.fail).error

    with lock_folder(tmp_path / "sweep", "wait"):
        message = elsewhere(second)
    assert message.endswith("is working in this folder: wait until it ends, or give another hydra.sweep.dir")
    assert [path.name for path in (tmp_path / "sweep").iterdir()] == [LOCK]


def test_many_may_work_on_a_study_that_has_its_own_storage(tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    where = ["--multirun", f"hydra.sweep.dir={tmp_path / 'sweep'}", "hydra/sweeper=optuna", "method.lr=interval(0.1,1)"]
    where += [f"hydra.sweeper.storage=sqlite:///{tmp_path / 'study.db'}", "hydra.sweeper.n_trials=1"]

    def second() -> int:
        return run_command(
            "train", *where, folder=tmp_path, command=lambda config: write_summary(config.method.lr)
        ).status

    with lock_folder(tmp_path / "sweep", "wait"):
        assert elsewhere(second) == "0"


def test_jobs_of_one_sweep_do_not_share_a_folder(tmp_path: Path) -> None:
    done = []
    sweep = ["--multirun", f"hydra.sweep.dir={tmp_path / 'sweep'}", "hydra.sweep.subdir=x", "seed=0,1"]

    def command(config: DictConfig) -> float:
        done.append(config.seed)
        return 0.0

    finished = run_command("train", *sweep, folder=tmp_path, command=command)
    assert finished.status == 2
    assert done == [0]
    assert "job 0 of this sweep uses this folder" in finished.output
    assert not (tmp_path / "sweep" / "x" / "error.txt").exists(), "it is job 0's folder"
    assert "Traceback" not in finished.output
    run_command("train", *sweep, folder=tmp_path, command=command)
    assert done == [0, 0], "another sweep begins anew"
    local = run_command("train", *sweep, "hydra/launcher=local", folder=tmp_path, command=command)
    assert "hydra.sweep.subdir=x is one folder for all jobs" in local.error
