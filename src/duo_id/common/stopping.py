"""Signals that ask a process to end: it saves its work and exits, as after Ctrl-C, with status 128 + signal."""

import errno
import os
import signal
import termios
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn

RETRY_DELAY = 0.01  # seconds until a signal is sent again that arrived where an exception would be lost
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)


class Stopped(KeyboardInterrupt):
    """A signal has asked the process to end; handled like Ctrl-C."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


_signals_seen = 0  # including the first, which ended the work


def status_of(error: KeyboardInterrupt) -> int:
    """The exit status of a process that this interrupt ends."""
    return 128 + getattr(error, "number", signal.SIGINT)


def describe_interrupt(error: KeyboardInterrupt) -> str:
    """The message for the user."""
    number = getattr(error, "number", signal.SIGINT)
    return "interrupted" if number == signal.SIGINT else f"interrupted by {signal.Signals(number).name}"


@contextmanager
def stoppable() -> Iterator[None]:
    """Make the signals raise `Stopped` in the block.

    The second signal is ignored, so that the work can be saved; the third ends the process at once. Signals that are
    ignored (nohup) or have other handlers (submitit) are left alone.
    """
    global _signals_seen
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    defaults = (signal.SIG_DFL, signal.default_int_handler)
    previous = {number: signal.getsignal(number) for number in SIGNALS if signal.getsignal(number) in defaults}
    try:
        for number in previous:
            signal.signal(number, _raise_stopped)
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        if previous:
            _signals_seen = 0


def listen(note: Callable[[int], None]) -> Callable[[], None]:
    """Pass the first signal that asks for the end to `note` instead of its handler, which gets the following ones.

    In a job of submitit, its preemption signal is one of them, and SIGTERM is ignored: Slurm sends it along with the
    other, and a job that ends on it is not requeued.

    Returns:
        a function that stops listening.
    """
    if threading.current_thread() is not threading.main_thread():
        return lambda: None
    preempting = preemption()
    numbers = {*SIGNALS, *([] if preempting is None else [preempting])}
    previous = {number: handler for number in numbers if callable(handler := signal.getsignal(number)) or handler == 0}

    def restore() -> None:
        for number, handler in previous.items():
            signal.signal(number, handler)

    def first(number: int, frame: FrameType | None) -> None:
        _redirect_lost_terminal(number)
        restore()
        note(number)

    for number in previous:
        ignored = preempting is not None and number == signal.SIGTERM != preempting
        signal.signal(number, _ignore if ignored else first)
    return restore


def stop(number: int) -> NoReturn:
    """End the saved work on a signal that `listen` noted; submitit requeues a job that was preempted.

    Raises:
        Stopped: always, except in a job that is requeued.
    """
    global _signals_seen
    if number == preemption():
        signal.raise_signal(number)  # submitit's handler ends the process
    _signals_seen = max(_signals_seen, 1)
    raise Stopped(number)


def preemption() -> int | None:
    """The signal by which submitit announces preemption to this process; None if this is no job of submitit."""
    number = getattr(signal, f"SIG{os.environ.get('SUBMITIT_PREEMPT_SIGNAL', 'USR2')}", None)
    handled = "SUBMITIT_EXECUTOR" in os.environ and number is not None and callable(signal.getsignal(number))
    return number if handled else None


def leave_to_main(*_: Any) -> None:
    """Ignore the signals that ask for the end, in a worker process: `timeout`, Slurm and Ctrl-C send them to all.

    The main process saves its work, and its workers end when it has done so.
    """
    for number in (*SIGNALS, preemption()):
        if number is not None:
            signal.signal(number, signal.SIG_IGN)


def die_quietly() -> None:
    """Let Ctrl-C end the process silently until a handler is installed: this early there is nothing to save."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def _raise_stopped(number: int, frame: FrameType | None) -> None:
    global _signals_seen
    if _in_finaliser(frame):
        retry = threading.Timer(RETRY_DELAY, os.kill, (os.getpid(), number))
        retry.daemon = True
        retry.start()
        return
    _redirect_lost_terminal(number)
    _signals_seen += 1
    if _signals_seen == 1:
        raise Stopped(number)
    if _signals_seen > 2:
        os._exit(128 + number)


def _in_finaliser(frame: FrameType | None) -> bool:
    """Whether a `__del__` is running, where Python prints exceptions and continues."""
    while frame is not None and frame.f_code.co_name != "__del__":
        frame = frame.f_back
    return frame is not None


def _ignore(*_: Any) -> None:
    pass


def _redirect_lost_terminal(number: int) -> None:
    """After a hangup, discard further output: writing to a closed terminal is an error."""
    if number != signal.SIGHUP:
        return
    for stream in (1, 2):
        try:
            termios.tcgetattr(stream)
        except termios.error as error:
            if error.args[0] == errno.EIO:
                null = os.open(os.devnull, os.O_WRONLY)
                os.dup2(null, stream)
                os.close(null)
