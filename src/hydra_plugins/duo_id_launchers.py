"""`hydra/launcher=local`: jobs of a sweep side by side, each in a process of its own with a GPU of its own.

The processes are submitit's, whose local executor does not give each job another GPU nor let the next one wait for it.
Hydra imports this module whenever a command starts, so what is heavy is imported when jobs start.
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
LOOK: dict[str, Any] = {"soft_wrap": True, "markup": False, "highlight": False}
GRACE = 60  # seconds that a job has for saving, once its launcher is gone
YEAR = 365 * 24 * 60  # minutes: jobs end by themselves


class LocalLauncher(Launcher):
    """As many jobs at a time as there are GPUs, each with one; without GPUs `n_jobs` at a time."""

    def __init__(self, n_jobs: int | None, folder: str) -> None:
        """Keep the settings, see conf/hydra/launcher/local.yaml."""
        self.n_jobs, self.folder = n_jobs, folder

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Called by Hydra before `launch`."""
        self.hydra_context, self.task_function, self.config = hydra_context, task_function, config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> list[JobReturn]:
        """Run the jobs, numbered from `initial_job_idx`, and wait for all of them; one that dies is a failed one."""
        where = OmegaConf.to_container(self.config.hydra.sweep, resolve=False)["subdir"]  # type: ignore[index,call-overload]
        if len(job_overrides) > 1 and "${" not in str(where):
            raise UserError(
                f"hydra.sweep.subdir={where} is one folder for all jobs: let it differ, as ${{hydra.job.num}} does"
            )
        gpus = visible_gpus()
        count = self.n_jobs if self.n_jobs is not None else max(len(gpus), 1)
        if count < 1 or count > len(gpus) > 0:
            most = f"at most {len(gpus)}, a job a GPU" if gpus else "at least 1"
            raise UserError(f"hydra.launcher.n_jobs={count} must be {most}")
        Path(self.config.hydra.sweep.dir).mkdir(parents=True, exist_ok=True)
        free: SimpleQueue[str] = SimpleQueue()
        for index in range(count):
            free.put(gpus[index] if gpus else "")
        threads = max(1, (os.cpu_count() or 1) // count)
        lock = _Lock(Path(self.folder) / "launcher.lock")
        state = Singleton.get_state()
        calls = [
            _Call(self.hydra_context, self.task_function, self.config, state, list(overrides), number, lock.path)
            for number, overrides in enumerate(job_overrides, initial_job_idx)
        ]

        def run(call: _Call) -> JobReturn:
            gpu = free.get()
            try:
                return self._run(call, gpu, threads)
            finally:
                free.put(gpu)

        with lock, ThreadPoolExecutor(count) as pool:
            try:
                return list(pool.map(run, calls))
            except BaseException:
                lock.release()
                pool.shutdown(cancel_futures=True)  # jobs that run save and end
                raise

    def _run(self, call: "_Call", gpu: str, threads: int) -> JobReturn:
        """Run a job in a process of its own, and wait for it."""
        import submitit

        from duo_id.common.run_folders import ERROR

        shared = set(self.config.hydra.overrides.task)
        overrides = [override for override in filter_overrides(call.overrides) if override not in shared]
        on_gpu = f" on GPU {gpu}" if gpu else ""
        console.print(f"job {call.number}{on_gpu}: {' '.join(overrides)}", **LOOK)
        executor = submitit.LocalExecutor(self.folder)
        # Ctrl-C reaches jobs through the launcher alone: submitit would give them a second to end.
        setup = [f"export CUDA_VISIBLE_DEVICES={gpu}", f"export OMP_NUM_THREADS={threads}", "trap '' INT HUP"]
        executor.update_parameters(timeout_min=YEAR, stderr_to_stdout=True, setup=setup)
        try:
            job = executor.submit(call)
            job.cancel_at_deletion()
            return job.result()
        except Exception as error:  # its process was killed, or what it returned cannot be read
            reason = f"died: {(str(error).splitlines() or [type(error).__name__])[-1]}"
            console.print(f"job {call.number} {reason}", **LOOK)
            folder = Path(self.config.hydra.sweep.dir) / str(call.number)
            if folder.is_dir():
                write_text(folder / ERROR, reason)
            return JobReturn(overrides=call.overrides, status=JobStatus.COMPLETED, _return_value=float("nan"))


class _Lock:
    """A lock that a launcher holds while it lives: jobs that wait for it know when it is gone, however it ended."""

    def __init__(self, path: Path) -> None:
        self.path = path.absolute()

    def __enter__(self) -> "_Lock":
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self.path.open("w")
        fcntl.lockf(self._file, fcntl.LOCK_EX)
        return self

    def release(self) -> None:
        """Let the jobs end."""
        self._file.close()

    def __exit__(self, *_: object) -> None:
        self.release()


def _end_with(lock: Path) -> None:
    """Interrupt this process once the launcher is gone; one that does not end by that within a minute is killed."""
    with lock.open() as file:
        fcntl.lockf(file, fcntl.LOCK_SH)
        main = threading.main_thread().ident
        assert main is not None
        signal.pthread_kill(main, signal.SIGINT)  # it may wait, and a signal to another thread would not wake it
        time.sleep(GRACE)
        os._exit(128 + signal.SIGINT)


class _Call:
    """One job, as it goes to another process."""

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
        self.lock = lock  # of a launcher that the job must not outlive

    def checkpoint(self) -> Any:
        """What submitit queues again when it cuts the job off: the same, which goes on from what it has saved."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)

    def __call__(self) -> JobReturn:
        if self.lock is not None:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            threading.Thread(target=_end_with, args=(self.lock,), daemon=True).start()
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


def visible_gpus() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    import torch

    named = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    return named or [str(index) for index in range(torch.cuda.device_count())]
