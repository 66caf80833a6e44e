"""The long campaign: `python -m tests.faults --seed 0 --trials 200`, and one of its trials: `--only kills/train/7`.

`--kind lines` and `--kind files` draw bad command lines and broken files from their grammars.
"""

import argparse
import itertools
import random
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from tests.faults import disks, kills, together
from tests.faults.broken_files import file_trials
from tests.faults.cases import CASES
from tests.faults.command_lines import command_line_trials
from tests.faults.trials import FINDINGS, Bench, Trial

KINDS: dict[str, Callable[[Bench, str, int], Trial]] = {
    "kills": lambda bench, name, seed: kills.trial(bench, CASES[name], seed),
    "disks": lambda bench, name, seed: disks.trial(bench, CASES[name], seed),
    "together": lambda bench, name, seed: together.trial(bench, CASES[name], seed),
}
GRAMMARS = {"lines": command_line_trials, "files": file_trials}
RIGHT = ("refused", "ran", "equal")  # outcomes of a bad line or a broken file
COLUMNS = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("left:"), TimeRemainingColumn())
SHARES = {"kills": 0.7, "disks": 0.2, "together": 0.1}
SLOW = {"local": 0.2, "lm_eval": 0.2, "evaluate": 0.7}  # how often they are tried, beside the others


def drawn(seed: int, kinds: Sequence[str], names: Sequence[str]) -> Iterator[tuple[str, str, int]]:
    """Kinds, commands and seeds of trials without end."""
    chances = random.Random(seed)
    for number in itertools.count():
        (kind,) = chances.choices(kinds, [SHARES[kind] for kind in kinds])
        (name,) = chances.choices(names, [SLOW.get(name, 1.0) for name in names])
        yield kind, name, seed * 100_000 + number


def tables(trials: Sequence[Trial]) -> Iterator[Table]:
    """What came out, by kind, command and fault; a trial with several faults counts once for each of them."""
    groups: dict[str, Callable[[Trial], set[str]]] = {
        "kind": lambda one: {one.kind},
        "command": lambda one: {one.case.name},
        "fault": lambda one: set(one.faults),
    }
    for title, of in groups.items():
        table = Table(title, "trials", "faults", "struck", *FINDINGS)
        for name in sorted(set().union(*map(of, trials))):
            those = [one for one in trials if name in of(one)]
            faults = sum(len(one.faults) if title != "fault" else one.faults.count(name) for one in those)
            counts = [sum(finding in dict(one.found) for one in those) for finding in FINDINGS]
            table.add_row(name, *map(str, (len(those), faults, sum(one.struck for one in those), *counts)))
        yield table


def draw(kind: str, seed: int, trials: int, console: Console) -> bool:
    """Try bad lines or broken files, and show what came of them; whether all were told as they should be."""
    outcomes: Counter[str] = Counter()
    shown = Progress(TextColumn("{task.description}"), *COLUMNS, console=console)
    with suppress(KeyboardInterrupt), shown as progress:
        bar = progress.add_task(kind, total=trials)
        for name, again, outcome, detail in GRAMMARS[kind](seed, trials):
            outcomes[outcome] += 1
            if outcome not in RIGHT:
                console.print(f"{name}: {outcome}\n{detail}\nagain: {again}", markup=False)
            progress.advance(bar)
    console.print(f"{kind}: {outcomes.total()} tried:", ", ".join(f"{n} {one}" for one, n in outcomes.most_common()))
    return not outcomes.keys() - set(RIGHT)


def main() -> int:
    """Run the command; the exit status is 1 if a trial found something."""
    parser = argparse.ArgumentParser("python -m tests.faults", description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--trials", type=int, default=200)
    parser.add_argument("--kind", action="append", choices=[*KINDS, *GRAMMARS], help="default: kills, disks, together")
    parser.add_argument("--command", action="append", choices=CASES, help="default: all")
    parser.add_argument("--only", metavar="KIND/COMMAND/SEED", action="append", default=[])
    options, console = parser.parse_args(), Console()
    console.width = max(console.width, 110)  # also in a file
    if grammars := [kind for kind in options.kind or [] if kind in GRAMMARS]:
        return int(sum(not draw(kind, options.seed, options.trials, console) for kind in grammars) > 0)
    drawing = drawn(options.seed, options.kind or list(KINDS), options.command or list(CASES))
    todo = [one.split("/") for one in options.only] or list(itertools.islice(drawing, options.trials))
    root, trials = Path(tempfile.mkdtemp(prefix="faults-")), []
    bench = Bench(root / "bench")
    shown = Progress(TextColumn("{task.description}"), *COLUMNS, console=console)
    with suppress(KeyboardInterrupt), shown as progress:  # Ctrl-C: what was tried is told
        bar = progress.add_task("", total=len(todo))
        for kind, name, seed in todo:
            progress.update(bar, description=f"{kind}/{name}/{seed}")
            trial = KINDS[kind](bench, name, int(seed))
            trials.append(trial)
            for finding, evidence in trial.found:
                console.print(f"{trial.name}: {finding}: {'; '.join(trial.told)}\n{evidence}", markup=False)
            if not trial.found and len(todo) > 1:
                shutil.rmtree(bench.root / trial.name.replace("/", "-"))
            progress.advance(bar)
    console.print(*tables(trials), sep="\n")
    failed = [trial.name for trial in trials if trial.found]
    if failed:
        console.print(f"what they left: {root}; again: python -m tests.faults", *(f"--only {one}" for one in failed))
        return 1
    shutil.rmtree(root, ignore_errors=True)  # after Ctrl-C something may still write there
    return 0


if __name__ == "__main__":
    sys.exit(main())
