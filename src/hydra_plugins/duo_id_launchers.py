"""`hydra/launcher=local` and `=ray`: jobs of a sweep side by side, each in a process of its own with a GPU of its own.

The processes are submitit's and Ray's. Neither submitit's local executor nor Hydra's plugins give each job another
GPU and let the next job wait for a free one, and Hydra's plugin for Ray brings AWS's client along.
Hydra imports this module whenever a command starts, so what is heavy is imported when jobs start.
"""

import fcntl
import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn, JobStatus, filter_overrides, run_job, setup_globals
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict
from rich.console import Console

from duo_id.common.errors import UserError
from duo_id.common.files import write_text
from duo_id.common.stopping import describe_interrupt, status_of, stoppable

Job = Callable[[], JobReturn]
LOOK: dict[str, Any] = {"soft_wrap": True, "markup": False, "highlight": False}
GRACE = 60  # seconds that a job has for saving, once its launcher is gone
YEAR = 365 * 24 * 60  # minutes: jobs end by themselves


class _ProcessLauncher(Launcher):
    """What launchers share whose jobs run in other processes; a job that dies is a failed one."""

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Called by Hydra before `launch`."""
        self.hydra_context, self.task_function, self.config = hydra_context, task_function, config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> list[JobReturn]:
        """Run the jobs, numbered from `initial_job_idx`, and wait for all of them."""
        from duo_id.common.cli import ERROR

        where = OmegaConf.to_container(self.config.hydra.sweep, resolve=False)["subdir"]  # type: ignore[index,call-overload]
        if len(job_overrides) > 1 and "${" not in str(where):
            raise UserError(
                f"hydra.sweep.subdir={where} is one folder for all jobs: let it differ, as ${{hydra.job.num}} does"
            )
        Path(self.config.hydra.sweep.dir).mkdir(parents=True, exist_ok=True)
        state, console, shared = Singleton.get_state(), Console(), set(self.config.hydra.overrides.task)
        calls = [
            _Call(self.hydra_context, self.task_function, self.config, state, list(overrides), number)
            for number, overrides in enumerate(job_overrides, initial_job_idx)
        ]

        def ended(call: _Call, place: str, run: Job) -> JobReturn:
            asked = [override for override in filter_overrides(call.overrides) if override not in shared]
            console.print(f"job {call.number}{place}: {' '.join(asked)}", **LOOK)
            try:
                return run()
            except Exception as error:  # its process was killed, or what it returned cannot be read
                reason = f"died: {(str(error).splitlines() or [type(error).__name__])[-1]}"
                console.print(f"job {call.number} {reason}", **LOOK)
                folder = Path(self.config.hydra.sweep.dir) / str(call.number)
                if folder.is_dir():
                    write_text(folder / ERROR, reason)
                return JobReturn(overrides=call.overrides, status=JobStatus.COMPLETED, _return_value=float("nan"))

        return self._run(calls, ended)

    def _run(self, calls: "Sequence[_Call]", ended: "Callable[[_Call, str, Job], JobReturn]") -> list[JobReturn]:
        raise NotImplementedError


class LocalLauncher(_ProcessLauncher):
    """As many jobs at a time as there are GPUs, each with one; without GPUs `n_jobs` at a time."""

    def __init__(self, n_jobs: int | None, folder: str) -> None:
        """Keep the settings, see conf/hydra/launcher/local.yaml."""
        self.n_jobs, self.folder = n_jobs, folder

    def _run(self, calls: "Sequence[_Call]", ended: "Callable[[_Call, str, Job], JobReturn]") -> list[JobReturn]:
        import submitit

        gpus = visible_gpus()
        count = self.n_jobs if self.n_jobs is not None else max(len(gpus), 1)
        if count < 1 or count > len(gpus) > 0:
            most = f"at most {len(gpus)}, a job a GPU" if gpus else "at least 1"
            raise UserError(f"hydra.launcher.n_jobs={count} must be {most}")
        free: SimpleQueue[str] = SimpleQueue()
        for place in range(count):
            free.put(gpus[place] if gpus else "")
        threads = f"export OMP_NUM_THREADS={max(1, (os.cpu_count() or 1) // count)}"
        alive = _Alive(Path(self.folder) / "launcher.lock")
        for call in calls:
            call.launcher = alive.path.absolute()

        def run(call: _Call) -> JobReturn:
            gpu = free.get()
            executor = submitit.LocalExecutor(self.folder)
            # Ctrl-C reaches jobs through the launcher alone: submitit would give them a second to end.
            setup = [f"export CUDA_VISIBLE_DEVICES={gpu}", threads, "trap '' INT HUP"]
            executor.update_parameters(timeout_min=YEAR, stderr_to_stdout=True, setup=setup)

            def started() -> JobReturn:
                job = executor.submit(call)
                job.cancel_at_deletion()
                return job.result()

            try:
                return ended(call, f" on GPU {gpu}" if gpu else "", started)
            finally:
                free.put(gpu)

        with alive, ThreadPoolExecutor(count) as pool:
            try:
                return list(pool.map(run, calls))
            except BaseException:
                alive.release()
                pool.shutdown(cancel_futures=True)  # jobs that run save and end
                raise


class RayLauncher(_ProcessLauncher):
    """As many jobs at a time as a Ray cluster, or Ray on this machine, has room for."""

    def __init__(self, init: DictConfig, remote: DictConfig) -> None:
        """Keep the settings, see conf/hydra/launcher/ray.yaml."""
        self.init, self.remote = (OmegaConf.to_container(one, resolve=True) for one in (init, remote))

    def _run(self, calls: "Sequence[_Call]", ended: "Callable[[_Call, str, Job], JobReturn]") -> list[JobReturn]:
        try:
            import ray
        except ImportError as error:
            raise UserError("hydra/launcher=ray needs Ray: pip install 'duo_id[ray]'") from error
        try:
            ray.init(**self.init)  # type: ignore[arg-type]
        except (ConnectionError, ValueError, TypeError) as error:
            raise UserError(f"hydra.launcher.init={self.init}: {error}") from error
        try:
            run: Any = ray.remote(_called).options(**self.remote)  # type: ignore[arg-type]
            get: Any = ray.get
            jobs = [run.remote(call) for call in calls]
            return [ended(call, "", partial(get, job)) for call, job in zip(calls, jobs, strict=True)]
        finally:
            ray.shutdown()


class _Alive:
    """A lock that a launcher holds while it lives: jobs that wait for it know when it is gone, however it ended."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> "_Alive":
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self.path.open("w")
        fcntl.lockf(self._file, fcntl.LOCK_EX)
        return self

    def release(self) -> None:
        """Let the jobs end."""
        self._file.close()

    def __exit__(self, *_: object) -> None:
        self.release()


def _end_with(launcher: Path) -> None:
    """Interrupt this process once the launcher is gone; one that does not end by that within a minute is killed."""
    with launcher.open() as file:
        fcntl.lockf(file, fcntl.LOCK_SH)
        main = threading.main_thread().ident
        assert main is not None
        signal.pthread_kill(main, signal.SIGINT)  # it may wait, and a signal to another thread would not wake it
        time.sleep(GRACE)
        os._exit(128 + signal.SIGINT)


class _Call:
    """One job, as it goes to another process."""

    launcher: Path | None = None  # the lock of a launcher that the job must not outlive

    def __init__(
        self,
        hydra_context: HydraContext,
        task_function: TaskFunction,
        config: DictConfig,
        state: dict[type, Any],
        overrides: list[str],
        number: int,
    ) -> None:
        self.hydra_context, self.task_function, self.config = hydra_context, task_function, config
        self.state, self.overrides, self.number = state, overrides, number

    def checkpoint(self) -> Any:
        """What submitit queues again when it cuts the job off: the same, which goes on from what it has saved."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)

    def __call__(self) -> JobReturn:
        if self.launcher is not None:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            threading.Thread(target=_end_with, args=(self.launcher,), daemon=True).start()
        Singleton.set_state(self.state)
        setup_globals()
        config = self.hydra_context.config_loader.load_sweep_config(self.config, self.overrides)
        with open_dict(config):
            config.hydra.job.id = config.hydra.job.num = self.number
        try:
            with stoppable():
                return run_job(
                    hydra_context=self.hydra_context,
                    task_function=self.task_function,
                    config=config,
                    job_dir_key="hydra.sweep.dir",
                    job_subdir_key="hydra.sweep.subdir",
                )
        except KeyboardInterrupt as error:
            print(describe_interrupt(error), flush=True)
            os._exit(status_of(error))  # nothing is left to do, and what is printed at exit would be a traceback


def _called(call: _Call) -> JobReturn:
    return call()


def visible_gpus() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    import torch

    named = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    return named or [str(index) for index in range(torch.cuda.device_count())]
