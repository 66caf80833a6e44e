"""A process that has imported the commands once and forks for every trial, so that one costs what it computes.

The parent talks to it over pipes, whatever threads it has itself; a trial that outlives its time is told to print where
it is, and is killed.
"""

import faulthandler
import importlib
import json
import os
import resource
import runpy
import select
import signal
import subprocess
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

MODULES = (
    "duo_id.train.run",
    "duo_id.evaluate.run",
    "duo_id.benchmark.run",
    "duo_id.report.page",
    "duo_id.convert",
    "duo_id.data.disk",
    "transformers.models.llama.modeling_llama",
    "matplotlib.backends.backend_agg",
    "duo_id.lm_eval.model",
    "lm_eval.__main__",
    "lm_eval.models.huggingface",
)
SECONDS = 20.0  # a trial may take
FRESH_SECONDS = 120.0  # and one that has to import everything itself
MEMORY = 8 * 2**30  # bytes that a trial may write to
GRACE = 1.0  # seconds for printing where it hangs
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "PYTORCH_NVML_BASED_CUDA_CHECK": "1",
    "COLUMNS": "200",
}


@dataclass(frozen=True)
class Ended:
    """How a trial ended.

    Attributes:
        status: its exit status, below 0 the signal that ended it; None: it had to be killed.
        output: what it printed.
    """

    status: int | None
    output: str


@dataclass(frozen=True)
class Worker:
    """The process that forks; see `worker`."""

    process: subprocess.Popen[str]
    folder: Path

    def call(self, function: str, *arguments: Any, cwd: Path, seconds: float = SECONDS) -> Ended:
        """Call MODULE:NAME with plain arguments in a forked process that works in `cwd`."""
        output = self.folder / "output.txt"
        asked = {"function": function, "arguments": arguments, "cwd": str(cwd), "output": str(output)}
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(asked | {"seconds": seconds}) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            raise RuntimeError("the worker has died")
        return Ended(json.loads(answer), output.read_text(encoding="utf-8", errors="replace"))


@contextmanager
def worker(folder: Path) -> Iterator[Worker]:
    """A worker that keeps the output of its trials in `folder`."""
    command = [sys.executable, "-m", "tests.faults.worker"]
    root = Path(__file__).parents[2]
    paths = {"PYTHONPATH": os.pathsep.join([str(root / "src"), str(root)]), "HF_DATASETS_CACHE": str(folder / "cache")}
    with subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=root,
        env=os.environ | ENVIRONMENT | paths,
    ) as process:
        try:
            yield Worker(process, folder)
        finally:
            process.kill()


def fresh(command: list[str], cwd: Path) -> Ended:
    """Run Python anew, as a user does."""
    root = Path(__file__).parents[2]
    paths = {"PYTHONPATH": os.pathsep.join([str(root / "src"), str(root)])}
    try:
        done = subprocess.run(
            [sys.executable, *command],
            cwd=cwd,
            env=os.environ | ENVIRONMENT | paths,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=FRESH_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        return Ended(None, (error.output or b"").decode(errors="replace"))
    return Ended(done.returncode, done.stdout.decode(errors="replace"))


def run(module: str, *arguments: str) -> None:
    """`python -m module argument...`, or of a file, `python file argument...`."""
    sys.argv = [module, *arguments]
    sys.modules.pop(module, None)  # which runpy would warn of
    if module.endswith(".py"):
        runpy.run_path(module, run_name="__main__")
    else:
        runpy.run_module(module, run_name="__main__", alter_sys=True)


def serve(requests: IO[str], answers: IO[str]) -> None:
    """Fork for each line of requests, and answer with the exit status; null: it had to be killed."""
    for line in requests:
        asked = json.loads(line)
        child = os.fork()
        if child == 0:
            _be(asked)
        answers.write(json.dumps(_waited(child, asked["seconds"])) + "\n")
        answers.flush()


def _waited(child: int, seconds: float) -> int | None:
    """The exit status of a child, which is killed with its own children after `seconds`."""
    handle = os.pidfd_open(child)
    try:
        ended = _ready(handle, seconds)
        if not ended:
            os.kill(child, signal.SIGABRT)  # where it is, see `_be`
            _ready(handle, GRACE)
        with suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)  # also what an ended trial has left behind
        status = os.waitpid(child, 0)[1]
        return os.waitstatus_to_exitcode(status) if ended else None
    finally:
        os.close(handle)


def _ready(handle: int, seconds: float) -> bool:
    return bool(select.select([handle], [], [], seconds)[0])


def _be(asked: dict[str, Any]) -> None:
    """Become the trial."""
    os.setsid()
    handle = os.open(asked["output"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for source, target in ((nothing, 0), (handle, 1), (handle, 2)):
        os.dup2(source, target)
    sys.stdin, sys.stdout = open(0), open(1, "w", encoding="utf-8")  # noqa: SIM115
    sys.stderr = open(2, "w", encoding="utf-8", buffering=1)  # noqa: SIM115
    faulthandler.enable(sys.stderr)
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.chdir(asked["cwd"])
    status = 1
    try:
        module, name = asked["function"].split(":")
        getattr(importlib.import_module(module), name)(*asked["arguments"])
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status & 255)


if __name__ == "__main__":
    for module in MODULES:
        importlib.import_module(module)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what an import prints is no answer
    serve(sys.stdin, answers)
