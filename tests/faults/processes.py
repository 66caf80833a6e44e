"""A command in a session of its own, to which something happens at a moment that a seed decides."""

import ctypes
import fcntl
import multiprocessing
import os
import resource
import signal
import sys
import tempfile
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.synchronize import Barrier
from pathlib import Path
from time import monotonic, sleep
from typing import Any

from tests.support.processes import SPAWNING, Started, start

SPAWNING.set_forkserver_preload(  # without effect where the server runs already
    [
        *(f"duo_id.{name}.run" for name in ("train", "evaluate", "benchmark")),
        "duo_id.report.page",
        "duo_id.convert",
        "duo_id.patterns.formats.registry",
        "duo_id.lm_eval.model",
        "duo_id.patterns.sharing",
        "transformers.models.llama.modeling_llama",
        "matplotlib.backends.backend_agg",
        "duo_id.data.disk",
        "optuna.samplers",
        "submitit",
        "lm_eval.__main__",
        "lm_eval.models.huggingface",
        "tests.faults.cases",
        "tests.support.warm",
    ]
)
MARK = "DUO_ID_FAULTS"  # environment: tells the descendants of one command, in whichever session they are
EVENTS = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "socket.connect"}
LIMIT = 120  # seconds after which a command hangs
GRACE = 30  # seconds in which what a command has started must end after it
OVERRIDES_PERMISSIONS = (1 << 1) | (1 << 2)  # capabilities of root to write and read what it may not: bits 1 and 2


@dataclass(frozen=True)
class Strike:
    """Something that happens to a process just before its n-th look at a folder.

    Opening, renaming, removing and making files are looks, as Python's own audit events tell them: what the C++ of a
    library does is none.

    Attributes:
        number: which, from 1; 0: never, they are only counted.
        what: the name of a signal; or `limit`: nothing can be written from there on; or `read-only`: its folders are.
        again: a second signal, so many looks later.
    """

    number: int = 0
    what: str = ""
    again: tuple[int, str] | None = None


@dataclass(frozen=True)
class Ended:
    """How a command ended.

    Attributes:
        status: its exit status, -n after signal n.
        output: what it printed.
        looks: how often it looked at its folder; 0 if it was killed.
        seconds: that it took.
        hangs: it had to be killed, or what it had started.
    """

    status: int
    output: str
    looks: int = 0
    seconds: float = 0.0
    hangs: bool = False

    @property
    def errors(self) -> list[str]:
        """The lines that tell an error."""
        return [line for line in self.output.splitlines() if "error: " in line]


@dataclass
class Running:
    """A command that has been started."""

    started: Started
    mark: str
    looks: Path
    output: int
    began: float = field(default_factory=monotonic)

    def signal(self, number: int, whole: bool = False) -> None:
        """Send a signal to the process, or to its whole group, as a terminal does; it may have ended."""
        with suppress(ProcessLookupError):
            pid = self.started.process.pid
            (os.killpg if whole else os.kill)(pid, number)

    def wait(self, seconds: float) -> bool:
        """Wait so long at most; whether it has ended."""
        self.started.process.join(seconds)
        return self.started.process.exitcode is not None

    def end(self) -> Ended:
        """Wait for the end of it and of all that it has started."""
        hangs = not self.wait(LIMIT)
        status, until = self.started.process.exitcode, monotonic() + GRACE
        seconds = monotonic() - self.began
        while left := ([] if hangs else relatives(self.started.process.pid, self.mark)):
            hangs = monotonic() > until
            sleep(0.02)
        for pid in relatives(self.started.process.pid, self.mark) if hangs else left:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if status is None:
            self.started.process.kill()
            self.started.process.join()
            status = -9
        looks = int(self.looks.read_text()) if self.looks.is_file() else 0
        printed = b""
        with suppress(BlockingIOError):  # somebody who is not ours holds the other end
            while part := os.read(self.output, 2**16):
                printed += part
        os.close(self.output)
        self.started.file.unlink()
        self.looks.unlink(missing_ok=True)
        return Ended(status, printed.decode(errors="replace"), looks, seconds, hangs)


def launch(
    function: Callable[..., object],
    *arguments: str,
    folder: Path,
    strike: Strike = Strike(),
    meeting: Barrier | None = None,
    powerless: bool = False,
    **environment: str,
) -> Running:
    """Start a command.

    Args:
        function: what it does, `tests.support.processes.run_module` for one.
        arguments: of the function.
        folder: that it works on, its working directory; what it prints goes beside it.
        strike: what happens to it when it looks at that folder.
        meeting: it begins when as many as this wants are there.
        powerless: root obeys permissions as everybody else does.
        environment: beside this process's.
    """
    number = uuid.uuid4().hex
    beside, looks = folder.with_name(f"{folder.name}.{number}.txt"), folder.with_name(f"{folder.name}.{number}.looks")
    os.mkfifo(beside)  # what is written there is not counted against limits on files
    output = os.open(beside, os.O_RDONLY | os.O_NONBLOCK)
    fcntl.fcntl(output, fcntl.F_SETPIPE_SZ, 2**20)
    options = (folder, strike, meeting, powerless, looks)
    scratch = folder.with_name(f"{folder.name}.tmp")
    scratch.mkdir(exist_ok=True)
    environment = {MARK: number, "TMPDIR": str(scratch)} | environment
    started = start(_alone, function, arguments, options, cwd=folder, file=beside, **environment)
    return Running(started, number, looks, output)


def relatives(session: int | None, mark: str) -> list[int]:
    """The processes of a session that live, and those anywhere that were started with a mark."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        with suppress(OSError, ValueError):
            state, _, _, its_session = (entry / "stat").read_text().rpartition(")")[2].split()[:4]
            marked = f"{MARK}={mark}".encode() in (entry / "environ").read_bytes()
            if state != "Z" and (int(its_session) == session or marked):
                found.append(int(entry.name))
    return found


def _alone(function: Callable[..., object], arguments: tuple[str, ...], options: tuple[Any, ...]) -> None:
    folder, strike, meeting, powerless, looks = options
    os.setsid()
    tempfile.tempdir = None  # TMPDIR is another now
    multiprocessing.set_start_method("fork", force=True)  # as a process of nobody's has it
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))  # a pipe now
    sys.modules.pop(arguments[0], None)  # a command is no module that somebody has imported
    if powerless:
        give_up_power()
    if meeting is not None:
        meeting.wait(LIMIT)
    seen, count, owner = str(folder), 0, os.getpid()

    def look(event: str, values: tuple[Any, ...]) -> None:
        nonlocal count
        if event not in EVENTS or os.getpid() != owner:
            return
        if event != "socket.connect" and not str(values[0]).startswith(seen):
            return
        count += 1
        if count == strike.number:
            _happen(strike.what, folder)
        elif strike.again and count == strike.number + strike.again[0] > strike.number > 0:
            _happen(strike.again[1], folder)

    sys.addaudithook(look)
    try:
        function(*arguments)
    finally:
        _unlimited()
        looks.write_text(str(count))


def _happen(what: str, folder: Path) -> None:
    if what == "limit":
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
    elif what == "read-only":
        for path in (folder, *folder.rglob("*")):
            if path.is_dir() and not path.is_symlink():
                path.chmod(0o555)
    else:
        os.kill(os.getpid(), signal.Signals[what])


def _unlimited() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


def run_fresh(name: str, *arguments: str) -> None:
    """`python -m name argument...` with its imports, in place of this process."""
    os.execv(sys.executable, [sys.executable, "-m", name, *arguments])


def give_up_power() -> None:
    """Let permissions hold for this process, also where it is root's."""
    if os.geteuid():
        return
    library = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    data = (ctypes.c_uint32 * 6)()
    library.capget(header, data)
    data[0] &= ~OVERRIDES_PERMISSIONS
    if library.capset(header, data):
        raise OSError(ctypes.get_errno(), "capset")
