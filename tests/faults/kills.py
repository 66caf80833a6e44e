"""Commands that a signal reaches at a moment of chance, once or several times, and that are gone on with."""

import signal
from pathlib import Path

from tests.faults.cases import Case
from tests.faults.processes import Ended, Strike, launch, run_fresh
from tests.faults.trials import Bench, Trial, unreadable
from tests.support.processes import run_module

SIGNALS = ("SIGKILL", "SIGTERM", "SIGHUP", "SIGINT", "SIGUSR1")


def trial(bench: Bench, case: Case, seed: int, timed: bool = True) -> Trial:
    """Kill a command up to three times, going on in between, then let it come to its end.

    Args:
        bench: where.
        case: the command.
        seed: decides which signals come, and when.
        timed: let some come by the clock, and reach new processes in their imports; otherwise, a signal comes at one
            of the command's looks at its folder, and a trial can be done again exactly.
    """
    made = Trial("kills", case, seed)
    chances, before, folder = made.chances, bench.undisturbed(case), bench.folder(made.name)
    for _ in range(chances.choice((1, 1, 2, 3))):
        name, second = chances.choice(SIGNALS), chances.choice((*SIGNALS, "", "", "", "", ""))
        by_clock = (timed and chances.random() < 0.4) or case.processes
        sent = [name, second] if second else [name]
        made.faults += sent
        if by_clock:
            ended = _by_clock(made, bench, folder, name, second)
        else:
            look = chances.randint(1, before.looks)
            again = (chances.randint(1, 5), second) if second else None
            made.told.append(f"{name} at look {look} of {before.looks}" + (f", {second} later" if second else ""))
            ended = bench.go(case, folder, strike=Strike(look, name, again))
        made.told.append(f"ended with {ended.status} after {ended.seconds:.2f} s")
        _check(made, bench, folder, ended, sent)
        if ended.status == 0:  # what comes after the end disturbs nothing
            bench.check_end(made, folder, ended)
            return made
    bench.check_end(made, folder, bench.go(case, folder))
    return made


def _by_clock(made: Trial, bench: Bench, folder: Path, name: str, second: str) -> Ended:
    """Send the signals so many seconds after the start, most of them after the imports."""
    chances, case, seconds = made.chances, made.case, bench.undisturbed(made.case).seconds
    fresh = case.function is run_module and chances.random() < 0.25
    imports = bench.imports() if fresh else 0.0
    moment = chances.uniform(0 if chances.random() < 0.3 else imports, imports + seconds)
    whole = name in ("SIGINT", "SIGHUP") and chances.random() < 0.5  # as a terminal does
    later = chances.uniform(0, 0.1)
    function = run_fresh if fresh else case.function
    running = launch(function, *case.call(folder, bench.inputs), folder=folder)
    if not running.wait(moment):
        running.signal(signal.Signals[name], whole)
        if second and not running.wait(later):
            running.signal(signal.Signals[second])
    made.told.append(f"{name} after {moment:.2f} of {imports + seconds:.2f} s, fresh: {fresh}, group: {whole} {second}")
    return running.end()


def _check(made: Trial, bench: Bench, folder: Path, ended: Ended, sent: list[str]) -> None:
    """Check how the command has ended, and what lies in its folder now."""
    made.check_words(ended)
    status = 128 - ended.status if ended.status < 0 else ended.status  # as a shell has it
    if status in {128 + signal.Signals[name] for name in sent}:
        made.struck = True
    elif status != 0:
        made.report("status", f"{sent}: {ended.status}\n{ended.output[-1500:]}")
    else:
        try:
            whole = made.case.results(folder / "run") == bench.undisturbed(made.case).results
        except Exception as error:
            made.report("silent", f"{sent}: status 0, but {error!r}\n{ended.output[-1500:]}")
        else:
            if not whole:
                made.report("silent", f"{sent}: status 0, but other results")
    if bad := list(unreadable(folder / "run")):
        made.report("silent", f"half files: {bad}")
