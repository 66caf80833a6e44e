"""`hydra/launcher=local`: jobs of a sweep in parallel, each in its own process with its own GPU.

submitit starts the processes; its local executor neither assigns GPUs nor queues jobs until one is free, which is done
here. Hydra imports this module whenever a command starts, so heavy modules are imported when jobs start.
"""

import fcntl
import os
import signal
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
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

console = Console()
PRINT_OPTIONS: dict[str, Any] = {"soft_wrap": True, "markup": False, "highlight": False}
GRACE_SECONDS = 60  # for a job to save its work once its launcher has ended
TIMEOUT_MINUTES = 365 * 24 * 60  # submitit requires one, and jobs end by themselves


class LocalLauncher(Launcher):
    """Runs `n_jobs` jobs at a time: by default one per GPU, or one without GPUs."""

    def __init__(self, n_jobs: int | None, folder: str) -> None:
        """Keep the settings, see conf/hydra/launcher/local.yaml."""
        self.n_jobs, self.folder = n_jobs, folder

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Called by Hydra before `launch`."""
        self.hydra_context, self.task_function, self.config = hydra_context, task_function, config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> list[JobReturn]:
        """Run the jobs, numbered from `initial_job_idx`, and wait for all; one whose process dies counts as failed."""
        subdir = OmegaConf.to_container(self.config.hydra.sweep, resolve=False)["subdir"]  # type: ignore[index,call-overload]
        if len(job_overrides) > 1 and "${" not in str(subdir):
            raise UserError(
                f"hydra.sweep.subdir={subdir} is one folder for all jobs: let it vary, as ${{hydra.job.num}} does"
            )
        gpus = visible_gpus()
        count = self.n_jobs if self.n_jobs is not None else max(len(gpus), 1)
        if count < 1 or count > len(gpus) > 0:
            allowed = f"between 1 and {len(gpus)}, the number of GPUs" if gpus else "at least 1"
            raise UserError(f"hydra.launcher.n_jobs={count} must be {allowed}")
        Path(self.config.hydra.sweep.dir).mkdir(parents=True, exist_ok=True)
        free_gpus: SimpleQueue[str] = SimpleQueue()
        for index in range(count):
            free_gpus.put(gpus[index] if gpus else "")
        threads = max(1, (os.cpu_count() or 1) // count)
        lock = _LauncherLock(Path(self.folder) / "launcher.lock")
        state = Singleton.get_state()
        jobs = [
            _Job(self.hydra_context, self.task_function, self.config, state, list(overrides), number, lock.path)
            for number, overrides in enumerate(job_overrides, initial_job_idx)
        ]

        def run(job: _Job) -> JobReturn:
            gpu = free_gpus.get()
            try:
                return self._run(job, gpu, threads)
            finally:
                free_gpus.put(gpu)

        with lock, ThreadPoolExecutor(count) as pool:
            try:
                return list(pool.map(run, jobs))
            except BaseException:
                lock.release()
                pool.shutdown(cancel_futures=True)  # running jobs save and end
                raise

    def _run(self, job: "_Job", gpu: str, threads: int) -> JobReturn:
        """Run a job in its own process, and wait for it."""
        import submitit

        from duo_id.common.run_folders import ERROR

        shared = set(self.config.hydra.overrides.task)
        overrides = [override for override in filter_overrides(job.overrides) if override not in shared]
        on_gpu = f" on GPU {gpu}" if gpu else ""
        console.print(f"job {job.number}{on_gpu}: {' '.join(overrides)}", **PRINT_OPTIONS)
        executor = submitit.LocalExecutor(self.folder)
        # Jobs get Ctrl-C from the launcher only: submitit would give them one second to end.
        setup = [f"export CUDA_VISIBLE_DEVICES={gpu}", f"export OMP_NUM_THREADS={threads}", "trap '' INT HUP"]
        executor.update_parameters(timeout_min=TIMEOUT_MINUTES, stderr_to_stdout=True, setup=setup)
        try:
            process = executor.submit(job)
            process.cancel_at_deletion()
            return process.result()
        except Exception as error:  # the process was killed, or its result cannot be read
            reason = f"died: {(str(error).splitlines() or [type(error).__name__])[-1]}"
            console.print(f"job {job.number} {reason}", **PRINT_OPTIONS)
            folder = Path(self.config.hydra.sweep.dir) / str(job.number)
            if folder.is_dir():
                write_text(folder / ERROR, reason)
            return JobReturn(overrides=job.overrides, status=JobStatus.COMPLETED, _return_value=float("nan"))


class _LauncherLock:
    """A lock that a launcher holds while it runs: jobs that wait for it notice its end, even if it is killed."""

    def __init__(self, path: Path) -> None:
        self.path = path.absolute()

    def __enter__(self) -> "_LauncherLock":
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self.path.open("w")
        fcntl.lockf(self._file, fcntl.LOCK_EX)
        return self

    def release(self) -> None:
        """Let the jobs end."""
        self._file.close()

    def __exit__(self, *_: object) -> None:
        self.release()


def _interrupt_when_launcher_ends(lock: Path) -> None:
    """Interrupt this process once the launcher has ended, and kill it if it takes longer than `GRACE_SECONDS`."""
    with lock.open() as file:
        fcntl.lockf(file, fcntl.LOCK_SH)
        main = threading.main_thread().ident
        assert main is not None
        signal.pthread_kill(main, signal.SIGINT)  # only a signal to the main thread wakes it
        time.sleep(GRACE_SECONDS)
        os._exit(128 + signal.SIGINT)


class _Job:
    """One job, pickled for its own process."""

    def __init__(
        self,
        hydra_context: HydraContext,
        task_function: TaskFunction,
        config: DictConfig,
        state: dict[type, Any],
        overrides: list[str],
        number: int,
        lock: Path | None,
    ) -> None:
        self.hydra_context, self.task_function, self.config = hydra_context, task_function, config
        self.state, self.overrides, self.number = state, overrides, number
        self.lock = lock  # of the launcher, which the job must not outlive

    def checkpoint(self) -> Any:
        """Called by submitit when it preempts the job: requeue it, and it resumes from what it has saved."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)

    def __call__(self) -> JobReturn:
        if self.lock is not None:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            threading.Thread(target=_interrupt_when_launcher_ends, args=(self.lock,), daemon=True).start()
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
            os._exit(status_of(error))  # a normal exit would print a traceback


def visible_gpus() -> list[str]:
    """The GPUs that this process may use, as names for CUDA_VISIBLE_DEVICES."""
    import torch

    visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    return visible or [str(index) for index in range(torch.cuda.device_count())]
