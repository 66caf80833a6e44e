"""`hydra/sweeper=optuna`: Optuna chooses the overrides of a sweep's jobs by the results of earlier jobs.

Hydra's own plugin pins Optuna below version 3; this one uses only Optuna's ask-and-tell interface. Hydra imports this
module whenever a command starts, so heavy imports wait until a sweep begins.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override, RangeSweep, Sweep
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf

from duo_id.common.errors import UserError, first_line
from duo_id.common.files import write_text

if TYPE_CHECKING:
    import optuna

DATABASE = "optuna.db"
RESULTS = "optimization_results.yaml"  # as Hydra's own plugin names it
SAMPLERS = ("tpe", "random")


class OptunaSweeper(Sweeper):
    """Runs the trials of a study as the jobs of a sweep, in batches; a killed sweep can be resumed."""

    hydra_context: HydraContext
    config: DictConfig
    launcher: Launcher

    def __init__(
        self,
        n_trials: int,
        n_jobs: int,
        sampler: Any,
        seed: int,
        direction: Any,
        storage: str | None,
        params: Mapping[str, str],
    ) -> None:
        """Store the settings, see conf/hydra/sweeper/optuna.yaml."""
        self.n_trials, self.n_jobs, self.sampler, self.seed = n_trials, n_jobs, sampler, seed
        self.direction, self.storage, self.params = direction, storage, params

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Called by Hydra before `sweep`."""
        self.hydra_context, self.config = hydra_context, config
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> None:
        """Run trials until `n_trials` of the study have ended, and write the best to `RESULTS`.

        Args:
            arguments: overrides, including those that sweep.

        Raises:
            UserError: a setting or a sweep is invalid, or the folder holds another sweep.
        """
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._check_settings()
        parser = OverridesParser.create(config_loader=self.hydra_context.config_loader)
        overrides = parser.parse_overrides([*(f"{key}={value}" for key, value in self.params.items()), *arguments])
        by_key = {override.get_key_element(): override for override in overrides}  # the command line wins
        space = {key: distribution(override) for key, override in by_key.items() if override.is_sweep_override()}
        fixed = [str(override.input_line) for override in by_key.values() if not override.is_sweep_override()]
        if not space:
            raise UserError(
                "hydra/sweeper=optuna: no override sweeps; give one, such as 'method.lr=interval(0.01,0.2)'"
            )
        folder = Path(self.config.hydra.sweep.dir)
        folder.mkdir(parents=True, exist_ok=True)
        OmegaConf.save(self.config, folder / "multirun.yaml")
        with self._storage_errors(folder):
            study = self._study(folder, {key: str(override) for key, override in space.items()}, fixed)
        while True:
            with self._storage_errors(folder):
                trials = self._next_trials(study, space)
            if not trials:
                return
            batch = [[*fixed, *(f"{key}={trial.params[key]}" for key in space)] for trial in trials]
            self.validate_batch_is_legal(batch)
            jobs = self.launcher.launch(batch, initial_job_idx=trials[0].number)
            with self._storage_errors(folder):
                for trial, job in zip(trials, jobs, strict=True):
                    state, value = outcome(job)
                    study.tell(trial.number, value, state)
            _write_best(study, folder)

    def _next_trials(
        self, study: "optuna.Study", space: "dict[str, optuna.distributions.BaseDistribution]"
    ) -> "Sequence[optuna.Trial | optuna.trial.FrozenTrial]":
        """The next batch of trials, interrupted ones first; empty once `n_trials` have ended.

        Draws depend on the number of trials, not on how often the sweep was interrupted.
        """
        import optuna

        trials, running = study.get_trials(), optuna.trial.TrialState.RUNNING
        complete = [trial for trial in trials if trial.params.keys() >= space.keys()]  # drawn completely
        cut_off = [trial for trial in complete if trial.state == running]
        if self.storage is None:  # then no other process uses it
            for trial in trials:
                if trial.state == running and trial not in complete:
                    study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
            if cut_off:
                first = cut_off[0].number
                return [trial for offset, trial in enumerate(cut_off) if trial.number == first + offset][: self.n_jobs]
        if self.sampler in SAMPLERS:
            kind = optuna.samplers.TPESampler if self.sampler == "tpe" else optuna.samplers.RandomSampler
            study.sampler = kind(seed=self.seed + len(complete))  # never the same draw twice
        remaining = self.n_trials - sum(trial.state.is_finished() for trial in complete)
        return [study.ask(space) for _ in range(min(remaining, self.n_jobs))]

    @contextmanager
    def _storage_errors(self, folder: Path) -> Iterator[None]:
        """Turn errors of SQLAlchemy, Optuna and SQLite about the storage into one line."""
        try:
            yield
        except UserError:
            raise
        except Exception as error:  # of many kinds
            reason = first_line(error.__cause__ or error)
            storage = self._storage_url(folder)
            raise UserError(
                f"hydra.sweeper.storage={self.storage}: {storage} cannot be opened or written ({reason})"
            ) from error

    def _storage_url(self, folder: Path) -> str:
        return self.storage or f"sqlite:///{folder.absolute() / DATABASE}"

    def _check_settings(self) -> None:
        for key in ("n_trials", "n_jobs"):
            if getattr(self, key) < 1:
                raise UserError(f"hydra.sweeper.{key}={getattr(self, key)} must be at least 1")
        if isinstance(self.sampler, str) and self.sampler not in SAMPLERS:
            raise UserError(f"hydra.sweeper.sampler={self.sampler}: choose {' or '.join(SAMPLERS)}")
        if self.direction not in ("minimize", "maximize"):
            raise UserError(f"hydra.sweeper.direction={self.direction}: choose minimize or maximize")

    def _study(self, folder: Path, space: Mapping[str, str], fixed: Sequence[str]) -> "optuna.Study":
        """The folder's study, new if there is none."""
        import optuna

        study = optuna.create_study(
            storage=self._storage_url(folder), study_name=folder.name, direction=self.direction, load_if_exists=True
        )
        definition = json.dumps([space, sorted(fixed), self.direction])
        saved = study.user_attrs.get("asked", definition)
        if saved != definition:
            raise UserError(f"hydra.sweep.dir={folder} holds another sweep, of {saved}; choose another folder")
        study.set_user_attr("asked", definition)
        if self.sampler not in SAMPLERS:
            study.sampler = self.sampler
        return study


def distribution(override: Override) -> "optuna.distributions.BaseDistribution":
    """The distribution that an override sweeps over.

    `choice(...)`, lists and globs are categorical, `range(...)` and `interval(...)` numeric, on a logarithmic scale
    with `tag(log, ...)`.

    Raises:
        UserError: Optuna does not support the sweep.
    """
    from optuna import distributions

    sweep, key = override.value(), override.get_key_element()
    assert isinstance(sweep, Sweep)
    log = "log" in sweep.tags
    try:
        if isinstance(sweep, IntervalSweep):
            low, high = sweep.start, sweep.end
            assert low is not None
            assert high is not None
            if isinstance(low, int) and isinstance(high, int):  # int(interval(1,8))
                return distributions.IntDistribution(low, high, log=log)
            return distributions.FloatDistribution(low, high, log=log)
        if isinstance(sweep, RangeSweep):
            values, step = sorted(sweep.range()), abs(sweep.step)  # as in Python, without its end
            if isinstance(step, int) and all(isinstance(value, int) for value in values):
                return distributions.IntDistribution(int(values[0]), int(values[-1]), log=log, step=step)
            return distributions.FloatDistribution(values[0], values[-1], log=log, step=None if log else step)
        return distributions.CategoricalDistribution(list(override.sweep_string_iterator()))
    except (ValueError, IndexError, TypeError, AttributeError) as error:
        raise UserError(f"{key}: Optuna cannot search {override.input_line} ({error})") from error


def outcome(job: JobReturn) -> tuple["optuna.trial.TrialState", float | None]:
    """A trial's final state and value; a value that is not a finite number is a failure."""
    import optuna

    states = optuna.trial.TrialState
    if job.status != JobStatus.COMPLETED:
        return (states.PRUNED if isinstance(job._return_value, optuna.TrialPruned) else states.FAIL), None
    value = job.return_value
    if isinstance(value, int | float) and math.isfinite(value):
        return states.COMPLETE, float(value)
    return states.FAIL, None


def _write_best(study: "optuna.Study", folder: Path) -> None:
    import optuna

    if study.get_trials(states=(optuna.trial.TrialState.COMPLETE,)):
        best = study.best_trial
        results = {"name": "optuna", "best_params": best.params, "best_value": best.value, "best_job": best.number}
        write_text(folder / RESULTS, OmegaConf.to_yaml(OmegaConf.create(results)))
