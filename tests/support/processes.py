"""Separate processes for commands that are killed, or that run at the same time, without repeated imports.

Importing duo_id.train takes as long as a hundred tiny steps, so one server process does it, at the first call, and all
others are forked from it: they have the modules, but no state from any test.
"""

import multiprocessing
import os
import runpy
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

# Modules that look for a GPU when they are imported must not initialise CUDA, or forked processes could not use it.
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
SPAWNING = multiprocessing.get_context("forkserver")
SPAWNING.set_forkserver_preload(
    ["duo_id.train.run", "transformers.models.llama.modeling_llama", "matplotlib.backends.backend_agg"]
)


@dataclass(frozen=True)
class Started:
    """A running process and the file that it prints to."""

    process: BaseProcess
    file: Path

    def finish(self, timeout: float = 300) -> tuple[int, str]:
        """Its exit status, negative if a signal killed it, and its output.

        Raises:
            TimeoutError: it has not ended in time, and is killed.
        """
        self.process.join(timeout)
        status, output = self.process.exitcode, self.file.read_text()
        if status is None:
            self.process.kill()
            raise TimeoutError(output)
        return status, output


def start(function: Callable[..., object], *arguments: Any, cwd: Path, file: Path, **environment: str) -> Started:
    """Call a module-level function in a new process with working directory `cwd` and its output in `file`."""
    process = SPAWNING.Process(target=_run_redirected, args=(function, arguments, cwd, file, environment))
    process.start()
    return Started(process, file)


def run_module(name: str, *arguments: str) -> None:
    """`python -m name argument...`."""
    sys.argv = [name, *arguments]
    sys.modules.pop(f"{name}.__main__", None)  # Python warns if a test has imported it
    runpy.run_module(name, run_name="__main__", alter_sys=True)


def run_file(path: str, *arguments: str) -> None:
    """`python path argument...`."""
    sys.argv = [path, *arguments]
    runpy.run_path(path, run_name="__main__")


def _run_redirected(
    function: Callable[..., object], arguments: tuple[Any, ...], cwd: Path, file: Path, environment: dict[str, str]
) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # shells start background jobs without it
    os.chdir(cwd)
    os.environ |= environment
    with file.open("wb") as output:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
            os.dup2(output.fileno(), stream.fileno())
    function(*arguments)
