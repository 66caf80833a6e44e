"""Signals that ask a process to end: whatever is at work saves and ends, as after Ctrl-C, with status 128 + signal."""

import errno
import os
import signal
import termios
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn

SOON = 0.01  # seconds until a signal is given again that came where no error gets through
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)


class Stopped(KeyboardInterrupt):
    """A signal has asked for the end; whatever handles Ctrl-C handles it."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


_seen = 0  # signals since the first that ended the work


def status_of(error: KeyboardInterrupt) -> int:
    """The exit status of a process that ends by it."""
    return 128 + getattr(error, "number", signal.SIGINT)


def describe_interrupt(error: KeyboardInterrupt) -> str:
    """What the user is told."""
    number = getattr(error, "number", signal.SIGINT)
    return "interrupted" if number == signal.SIGINT else f"interrupted by {signal.Signals(number).name}"


@contextmanager
def stoppable() -> Iterator[None]:
    """Let the signals raise `Stopped` in the block.

    The work then ends, and the next signal does not disturb that; another ends the process at once. A signal that is
    ignored (nohup) or that somebody else listens to (submitit) stays theirs.
    """
    global _seen
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    usual = (signal.SIG_DFL, signal.default_int_handler)
    before = {number: signal.getsignal(number) for number in SIGNALS if signal.getsignal(number) in usual}
    try:
        for number in before:
            signal.signal(number, _raise)
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if before:
            _seen = 0


def listen(note: Callable[[int], None]) -> Callable[[], None]:
    """Hand the first signal that asks for the end to `note`, and not to who listened before; the next goes there.

    In a job of submitit, the signal that it will be cut off is one of them. SIGTERM is none there: Slurm sends it
    beside the other, and what ends by it is not queued again.

    Returns:
        a function that stops listening.
    """
    if threading.current_thread() is not threading.main_thread():
        return lambda: None
    ahead = preemption()
    numbers = {*SIGNALS, *([] if ahead is None else [ahead])}
    before = {number: handler for number in numbers if callable(handler := signal.getsignal(number)) or handler == 0}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def first(number: int, frame: FrameType | None) -> None:
        _let_go_of_lost_terminal(number)
        restore()
        note(number)

    for number in before:
        signal.signal(number, _stay if ahead is not None and number == signal.SIGTERM != ahead else first)
    return restore


def stop(number: int) -> NoReturn:
    """End the work, which is saved, for a signal that was noted; a job that submitit cuts off is queued again.

    Raises:
        Stopped: always, but in a job that is queued again.
    """
    global _seen
    if number == preemption():
        signal.raise_signal(number)  # submitit's handler ends the process
    _seen = max(_seen, 1)
    raise Stopped(number)


def preemption() -> int | None:
    """The signal by which submitit tells a job, if this process is one, that it will be cut off."""
    number = getattr(signal, f"SIG{os.environ.get('SUBMITIT_PREEMPT_SIGNAL', 'USR2')}", None)
    known = "SUBMITIT_EXECUTOR" in os.environ and number is not None and callable(signal.getsignal(number))
    return number if known else None


def die_quietly() -> None:
    """Let Ctrl-C end the process without a word until somebody handles it: so early there is nothing to save."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def _raise(number: int, frame: FrameType | None) -> None:
    global _seen
    if _in_finaliser(frame):
        again = threading.Timer(SOON, os.kill, (os.getpid(), number))
        again.daemon = True
        again.start()
        return
    _let_go_of_lost_terminal(number)
    _seen += 1
    if _seen == 1:
        raise Stopped(number)
    if _seen > 2:
        os._exit(128 + number)


def _in_finaliser(frame: FrameType | None) -> bool:
    """Whether an object is being done away with, where Python prints an error and goes on."""
    while frame is not None and frame.f_code.co_name != "__del__":
        frame = frame.f_back
    return frame is not None


def _stay(*_: Any) -> None:
    pass


def _let_go_of_lost_terminal(number: int) -> None:
    """After a hangup, let what is still printed go nowhere: writing to a terminal that is gone is an error."""
    if number != signal.SIGHUP:
        return
    for stream in (1, 2):
        try:
            termios.tcgetattr(stream)
        except termios.error as error:
            if error.args[0] == errno.EIO:
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, stream)
                os.close(nowhere)
