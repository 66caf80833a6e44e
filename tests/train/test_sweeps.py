"""Sweeps: Optuna's trials, parallel processes, and the configuration of launchers."""

import json
import os
import signal
import sqlite3
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import yaml
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from omegaconf import DictConfig

from duo_id.common.config import conf_dir
from duo_id.common.errors import UserError
from duo_id.train.gate_training import GateTraining
from tests.support.commands import QUICK, Finished, run_command
from tests.support.processes import start
from tests.support.sweep_jobs import record_process, signal_launcher, write_summary

optuna = pytest.importorskip("optuna", exc_type=ImportError)  # and what it imports
distributions, load_study = optuna.distributions, optuna.load_study
distribution = pytest.importorskip("hydra_plugins.duo_id_optuna").distribution
LocalJob = pytest.importorskip("submitit").LocalJob

OPTUNA = ["hydra/sweeper=optuna", "hydra.sweeper.n_trials=3"]
SOURCES = os.pathsep.join([str(conf_dir().parent / "src"), str(conf_dir().parent)])
NO_WAIT = ("_results_timeout_s", 0)  # submitit waits 15 s for what a job that died has left
SPACE = "method.lr=interval(0.01,0.2)"


def sweep(folder: Path, *overrides: str, command: Callable[[DictConfig], Any]) -> Finished:
    """`train --multirun` with another function in place of training; the sweep's folder is `sweep`."""
    where = f"hydra.sweep.dir={folder / 'sweep'}"
    return run_command("train", "--multirun", "model=tiny", where, *overrides, folder=folder, command=command)


def distance(config: DictConfig) -> float:
    return write_summary(abs(config.method.lr - 0.1))


def best_of(folder: Path) -> dict[str, Any]:
    return yaml.safe_load((folder / "sweep" / "optimization_results.yaml").read_text())


def test_optuna_keeps_the_best_trial(tmp_path: Path) -> None:
    tried = []

    def command(config: DictConfig) -> float:
        tried.append(config.method.lr)
        return distance(config)

    finished = sweep(tmp_path, *OPTUNA, SPACE, "seed=3", command=command)
    assert finished.status == 0, finished.output
    assert len(set(tried)) == 3
    assert all(0.01 <= value <= 0.2 for value in tried)
    best = min(tried, key=lambda value: abs(value - 0.1))
    results = best_of(tmp_path)
    assert results["best_params"] == {"method.lr": best}
    assert results["best_value"] == pytest.approx(abs(best - 0.1))
    assert results["best_job"] == tried.index(best)
    assert "python -m duo_id.report" in finished.output


def test_failed_trials_do_not_end_the_search(tmp_path: Path) -> None:
    calls = []

    def command(config: DictConfig) -> float:
        calls.append(config.method.lr)
        if len(calls) == 1:
            raise UserError("method.lr: not today")
        if len(calls) == 2:
            raise RuntimeError("out of memory")
        return distance(config)

    finished = sweep(tmp_path, *OPTUNA, SPACE, "hydra.sweeper.n_jobs=2", command=command)
    assert finished.status == 2
    assert len(calls) == 3
    assert best_of(tmp_path)["best_job"] == 2
    assert (tmp_path / "sweep" / "0" / "error.txt").read_text() == "method.lr: not today"
    assert (tmp_path / "sweep" / "1" / "error.txt").read_text() == "out of memory"


def test_a_killed_search_can_be_resumed(tmp_path: Path) -> None:
    tried: list[float] = []

    def command(config: DictConfig) -> float:
        tried.append(config.method.lr)
        if len(tried) == 2:
            raise KeyboardInterrupt
        return distance(config)

    assert sweep(tmp_path, *OPTUNA, SPACE, command=command).status == 130
    sweep(tmp_path, *OPTUNA, SPACE, command=command)
    assert tried[2] == tried[1], "an interrupted trial is run again"
    assert len(set(tried)) == len(tried) - 1 == 3, "and counts once"
    study = load_study(study_name="sweep", storage=f"sqlite:///{tmp_path / 'sweep' / 'optuna.db'}")
    assert [trial.state.name for trial in study.trials] == ["COMPLETE"] * 3
    alone: list[float] = []
    (tmp_path / "other").mkdir()
    sweep(tmp_path / "other", *OPTUNA, SPACE, command=lambda config: alone.append(config.method.lr) or distance(config))
    assert alone == [tried[0], *tried[2:]], "draws do not depend on interruptions"
    other = sweep(tmp_path, *OPTUNA, "method.lr=interval(0.01,0.3)", command=command)
    assert "holds another sweep" in other.error


def test_incompletely_drawn_trials_do_not_count(tmp_path: Path) -> None:
    def cut_off(trial: Any, *args: Any) -> None:
        raise KeyboardInterrupt

    with patch.object(optuna.Trial, "_suggest", cut_off):
        assert sweep(tmp_path, *OPTUNA, SPACE, command=distance).status == 130
    assert sweep(tmp_path, *OPTUNA, SPACE, command=distance).status == 0
    study = load_study(study_name="sweep", storage=f"sqlite:///{tmp_path / 'sweep' / 'optuna.db'}")
    assert [trial.state.name for trial in study.trials] == ["FAIL", *["COMPLETE"] * 3]


def test_a_storage_failure_is_reported_in_one_line(tmp_path: Path) -> None:
    database = tmp_path / "sweep" / "optuna.db"

    def command(config: DictConfig) -> float:
        with closing(sqlite3.connect(database)) as connection:
            connection.execute("DROP TABLE trial_values")
            connection.commit()
        return distance(config)

    error = sweep(tmp_path, *OPTUNA, SPACE, command=command).error
    assert f"sqlite:///{database} cannot be opened or written (" in error


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("lr=interval(0.1,2)", distributions.FloatDistribution(0.1, 2.0)),
        ("lr=tag(log,interval(0.01,1))", distributions.FloatDistribution(0.01, 1.0, log=True)),
        ("n=int(interval(1,8))", distributions.IntDistribution(1, 8)),
        ("n=range(1,8,2)", distributions.IntDistribution(1, 7, step=2)),
        ("n=range(3)", distributions.IntDistribution(0, 2)),
        ("x=range(0.5,2,0.5)", distributions.FloatDistribution(0.5, 1.5, step=0.5)),
        ("blend=choice(student,teacher)", distributions.CategoricalDistribution(["student", "teacher"])),
        ("seed=0,1", distributions.CategoricalDistribution(["0", "1"])),
    ],
)
def test_hydras_sweeps_are_optunas_distributions(override: str, expected: distributions.BaseDistribution) -> None:
    (parsed,) = OverridesParser.create().parse_overrides([override])
    assert distribution(parsed) == expected


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["hydra.sweeper.sampler=nosuch", SPACE], "hydra.sweeper.sampler=nosuch: choose tpe or random"),
        (["hydra.sweeper.n_trials=0", SPACE], "hydra.sweeper.n_trials=0"),
        (["hydra.sweeper.direction=up", SPACE], "hydra.sweeper.direction=up"),
        (["hydra.sweeper.storage=nosuch://x", SPACE], "hydra.sweeper.storage=nosuch://x"),
        (["seed=1"], "no override sweeps"),
        (["method.lr=tag(log,interval(0,1))"], "method.lr: Optuna cannot search"),
        (["nosuch.key=interval(0,1)"], "nosuch.key"),
        (["hydra/launcher=local", "hydra.launcher.n_jobs=0", SPACE], "hydra.launcher.n_jobs=0"),
    ],
)
def test_invalid_sweeps_are_refused_in_one_line(overrides: list[str], named: str, tmp_path: Path) -> None:
    assert named in sweep(tmp_path, "hydra/sweeper=optuna", *overrides, command=distance).error


@pytest.mark.parametrize(("name", "kind"), [("local", "LocalLauncher"), ("slurm", "SlurmLauncher")])
def test_launchers_can_be_instantiated(name: str, kind: str) -> None:
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        config = compose("train", [f"hydra/launcher={name}", "hydra.job.num=0"], return_hydra_config=True)
        config.hydra.sweep.dir = "sweep"
        HydraConfig.instance().set_config(config)
        launcher = Plugins.instance()._instantiate(config.hydra.launcher)
    assert type(launcher).__name__ == kind
    if name == "slurm":
        assert (launcher.params["gpus_per_node"], launcher.params["tasks_per_node"]) == (1, 1)


def test_jobs_have_a_process_and_a_gpu_each_and_die_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-a,7")  # taken as they are named
    monkeypatch.setenv("PYTHONPATH", SOURCES, prepend=os.pathsep)
    monkeypatch.setattr(LocalJob, *NO_WAIT)
    finished = sweep(tmp_path, "hydra/launcher=local", "seed=0,1,2", command=record_process)
    assert finished.status == 2, finished.output
    jobs = [json.loads(path.read_text()) for path in sorted(tmp_path.glob("sweep/*/where.json"))]
    assert len(jobs) == 2, finished.output
    assert {gpu for gpu, _ in jobs} <= {"GPU-a", "7"}
    assert len({process for _, process in jobs} | {os.getpid()}) == 3
    assert (tmp_path / "sweep" / "1" / "error.txt").read_text().startswith("died: ")
    assert "job 1 died" in finished.output


def launch(folder: Path) -> None:
    """A sweep whose first job ends it."""
    os.environ["LAUNCHER"] = str(os.getpid())
    setattr(LocalJob, *NO_WAIT)
    finished = sweep(folder, "hydra/launcher=local", "hydra.launcher.n_jobs=1", "seed=0,1", command=signal_launcher)
    print(finished.output)
    sys.exit(finished.status)


def test_jobs_do_not_outlive_their_launcher(tmp_path: Path) -> None:
    started = {}
    for number, status in (signal.SIGKILL, -9), (signal.SIGTERM, 143):
        folder = tmp_path / number.name
        folder.mkdir()
        os.mkfifo(folder / "interrupted")
        environment = {
            "INTERRUPT_FILE": str(folder / "interrupted"),
            "NUMBER": str(int(number)),
            "CUDA_VISIBLE_DEVICES": "",
        }
        environment["PYTHONPATH"] = os.pathsep.join([SOURCES, os.environ.get("PYTHONPATH", "")])
        started[start(launch, folder, cwd=folder, file=folder / "output.txt", **environment)] = folder, status
    for launcher, (folder, status) in started.items():
        assert (folder / "interrupted").read_text() == "interrupted"  # and it has ended, or this would wait
        ended, output = launcher.finish()
        assert ended == status, output
        assert "Traceback" not in output
        assert not list(folder.glob("sweep/.jobs/*_result.pkl")), "the second job ran"
        assert "Traceback" not in "".join(path.read_text() for path in folder.glob("sweep/.jobs/*log.out"))


def cut_off(folder: Path) -> None:
    """A job that submitit preempts at its second step and requeues; prints how each part ends."""
    from submitit import LocalExecutor
    from submitit.core.submission import process_job
    from submitit.core.utils import DelayedSubmission, JobPaths

    from duo_id.train import __main__ as train

    calls, step, steps = [], GateTraining.training_step, []

    def queued(self: Any, call: Any) -> None:
        calls.append(call)
        raise RuntimeError("queued")

    def counted(self: GateTraining, *args: Any) -> Any:
        steps.append(self)
        if len(steps) == 2:
            signal.raise_signal(signal.SIGTERM)  # Slurm sends it too
            signal.raise_signal(signal.SIGUSR2)
        return step(self, *args)

    os.environ["DUO_ID_SWEEP"] = "of this test"
    few = [*QUICK, "trainer.max_steps=4", "checkpoint_seconds=1000", "comparison.validation_samples=0"]
    whole = run_command("train", *few, "seed=3", f"hydra.run.dir={folder / 'whole'}", folder=folder)
    with patch.object(LocalExecutor, "submit", queued):
        sweep(folder, *few, "hydra/launcher=local", "seed=3", command=train.main)
    delayed = DelayedSubmission(calls[0])
    delayed.function.lock = None  # the launcher has ended
    delayed.set_timeout(60 * 24, 3)
    delayed.dump(JobPaths(folder, "7").submitted_pickle)
    names = ("JOB_ID", "NTASKS", "JOB_NUM_NODES", "NODEID", "GLOBALID", "LOCALID")
    os.environ |= {f"SUBMITIT_LOCAL_{name}": value for name, value in zip(names, "711000", strict=True)}
    os.environ["SUBMITIT_EXECUTOR"] = "local"
    GateTraining.training_step = counted  # type: ignore[method-assign]
    ends: list[Any] = []
    for _ in range(2):
        try:
            process_job(folder)
            ends.append("done")
        except SystemExit as end:
            ends.append(end.code)
    GateTraining.training_step = step  # type: ignore[method-assign]
    print(json.dumps({"ends": ends, "steps": len(steps), "whole": whole.status}))


def test_a_preempted_and_requeued_job_resumes(tmp_path: Path) -> None:
    status, output = start(cut_off, tmp_path, cwd=tmp_path, file=tmp_path / "output.txt").finish()
    assert status == 0, output
    assert json.loads(output.splitlines()[-1]) == {"ends": [144, "done"], "steps": 4, "whole": 0}, output
    heads = [tmp_path / run / "heads" / "full_attention_heads.tsv" for run in ("sweep/0", "whole")]
    assert heads[0].read_text() == heads[1].read_text()
