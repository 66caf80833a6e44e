"""Processes of their own for commands that are killed, or that must meet others, without an import each.

Importing duo_id.train takes as long as a hundred tiny steps, so one process does it, at the first call, and every other
one is forked from that one: it has the modules, but nothing that a test has done.
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

# Whoever asks at import whether there is a GPU must not initialise CUDA, which forked processes could not use then.
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
        """Its exit status, -9 if it was killed by that signal, and what it printed.

        Raises:
            TimeoutError: it has not ended; it is killed.
        """
        self.process.join(timeout)
        status, output = self.process.exitcode, self.file.read_text()
        if status is None:
            self.process.kill()
            raise TimeoutError(output)
        return status, output


def start(function: Callable[..., object], *arguments: Any, cwd: Path, file: Path, **environment: str) -> Started:
    """Call a module's function in a new process that works in `cwd` and prints to `file`."""
    process = SPAWNING.Process(target=_printing, args=(function, arguments, cwd, file, environment))
    process.start()
    return Started(process, file)


def run_module(name: str, *arguments: str) -> None:
    """`python -m name argument...`."""
    sys.argv = [name, *arguments]
    sys.modules.pop(f"{name}.__main__", None)  # which a test may have imported, and Python warns of then
    runpy.run_module(name, run_name="__main__", alter_sys=True)


def run_file(path: str, *arguments: str) -> None:
    """`python path argument...`."""
    sys.argv = [path, *arguments]
    runpy.run_path(path, run_name="__main__")


def _printing(
    function: Callable[..., object], arguments: tuple[Any, ...], cwd: Path, file: Path, environment: dict[str, str]
) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs begin without
    os.chdir(cwd)
    os.environ |= environment
    with file.open("wb") as output:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
            os.dup2(output.fileno(), stream.fileno())
    function(*arguments)
