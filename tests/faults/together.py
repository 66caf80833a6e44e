"""Two commands at once in one folder, started at the same moment."""

from tests.faults.cases import Case
from tests.faults.processes import LIMIT, Ended, Strike, launch
from tests.faults.trials import Bench, Trial, unreadable
from tests.support.processes import SPAWNING


def trial(bench: Bench, case: Case, seed: int) -> Trial:
    """Let two do the same, or go on with the same killed run: one does it, and the other is told who does.

    Args:
        bench: where.
        case: the command.
        seed: decides whether the folder is new.
    """
    made = Trial("together", case, seed)
    before, folder, chances = bench.undisturbed(case), bench.folder(made.name), made.chances
    if chances.random() < 0.5 and not case.processes:
        look = chances.randint(1, before.looks)
        made.told.append(f"after SIGKILL at look {look}")
        bench.go(case, folder, strike=Strike(look, "SIGKILL"))
    meeting = SPAWNING.Barrier(2, timeout=LIMIT)
    call = case.call(folder, bench.inputs)
    both = [launch(case.function, *call, folder=folder, meeting=meeting) for _ in range(2)]
    ended = [one.end() for one in both]
    made.faults.append("together")
    made.told.append(f"ended with {[one.status for one in ended]}")
    for one in ended:
        made.check_words(one)
    _check(made, ended)
    if bad := list(unreadable(folder / "run")):
        made.report("silent", f"half files: {bad}")
    try:
        whole = case.results(folder / "run") == before.results
    except Exception as error:
        made.report("lost", repr(error))
    else:
        if not whole:
            made.report("unequal", "the results are not those of one alone")
    bench.check_end(made, folder, bench.go(case, folder)) if case.name != "data_gen" else None
    return made


def _check(made: Trial, ended: list[Ended]) -> None:
    lost = [one for one in ended if one.status != 0]
    made.struck = bool(lost)
    told = all(one.status == 2 and any(made.case.loses in line for line in one.errors) for one in lost)
    if len(lost) == 2 or (lost and not made.case.loses) or not told:
        made.report("status", "\n".join(one.output[-1000:] for one in lost))
