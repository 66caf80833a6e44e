"""Separate processes for commands that are killed, or that run at the same time, without repeated imports.

Importing duo_id.train takes as long as a hundred tiny steps, so one server process does it, at the first call, and all
others are forked from it: they have the modules, but no state from any test.
"""

import json
import multiprocessing
import os
import runpy
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

# Modules that look for a GPU when they are imported must not initialise CUDA, or forked processes could not use it.
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
SPAWNING = multiprocessing.get_context("forkserver")
SPAWNING.set_forkserver_preload(
    [
        "duo_id.train.run",
        "transformers.models.llama.modeling_llama",
        "matplotlib.backends.backend_agg",
        "pytest",
        "tests.support.commands",
        "tests.support.warm",
    ]
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


def run_file_on_two(path: str, *arguments: str) -> None:
    """`python path argument...`, where Lightning's second process is forked before the first begins, and waits."""
    from lightning.fabric.strategies.launchers import subprocess_script

    read, write = os.pipe()
    pid = os.fork()
    if pid:
        os.close(read)
        subprocess_script.subprocess = SimpleNamespace(Popen=partial(Second, pid, write))
        run_file(path, *arguments)
        return
    os.close(write)
    with os.fdopen(read) as pipe:
        given = pipe.read()
    if not given:  # the first has ended without it
        os._exit(0)
    command, environment, cwd = json.loads(given)
    os.chdir(cwd)
    os.environ |= environment
    run_file(*command[1:])


class Second:
    """What Lightning asks of the second process; to make one tells it to begin."""

    def __init__(self, pid: int, pipe: int, command: list[str], env: dict[str, str], cwd: str) -> None:
        self.pid = pid
        self.returncode: int | None = None
        with os.fdopen(pipe, "w") as begin:
            json.dump([command, env, cwd], begin)

    def poll(self) -> None:
        """Note how it has ended, if it has: its status, negative if a signal killed it."""
        if self.returncode is None:
            ended, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if ended else None

    def send_signal(self, number: int) -> None:
        """Send it a signal, unless it has ended."""
        if self.returncode is None:
            os.kill(self.pid, number)


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
