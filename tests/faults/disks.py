"""Commands whose disk becomes full or read-only at a moment of chance, and that are gone on with once it has room."""

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

from tests.faults.cases import Case
from tests.faults.processes import Ended, Strike
from tests.faults.trials import Bench, Trial, unreadable

FAULTS = ("limit", "read-only", "full")
PAGE = 4096


def trial(bench: Bench, case: Case, seed: int, fault: str = "") -> Trial:
    """Run a command until nothing can be written any more, make room, and let it come to its end.

    Args:
        bench: where.
        case: the command.
        seed: decides what happens, and when.
        fault: of `FAULTS`; "": whichever the seed decides. `full`, a small file system, needs the right to mount one.
    """
    made = Trial("disks", case, seed)
    before, folder = bench.undisturbed(case), bench.folder(made.name)
    drawn = made.chances.choice(FAULTS)
    fault = fault or drawn
    if fault == "full" and (before.bytes == 0 or not mounts()):
        fault = "limit"
    if case.processes and fault != "full":
        fault = "full" if mounts() else "read-only"
    made.faults.append(fault)
    if fault == "full":
        size = PAGE * int(4 + made.chances.random() * 1.2 * before.bytes / PAGE)
        made.told.append(f"a disk of {size} bytes, where {before.bytes} are needed")
        with small_disk(folder, size) as grow:
            ended = bench.go(case, folder, TMPDIR=str(folder))
            _check(made, folder, ended)
            grow()
            bench.check_end(made, folder, ended if ended.status == 0 else bench.go(case, folder))
        return made
    look = made.chances.randint(1, before.looks)
    made.told.append(f"{fault} from look {look} of {before.looks} on")
    ended = bench.go(case, folder, strike=Strike(look, fault), powerless=True)
    _check(made, folder, ended)
    for path in (folder, *folder.rglob("*")):
        if path.is_dir() and not path.is_symlink():
            path.chmod(0o755)
    bench.check_end(made, folder, ended if ended.status == 0 else bench.go(case, folder))
    return made


def _check(made: Trial, folder: Path, ended: Ended) -> None:
    """One line that names the path, and nothing half written."""
    made.told.append(f"ended with {ended.status}")
    made.check_words(ended)
    if ended.status != 0:
        made.struck = True
        named = [line for line in ended.errors if str(folder) in line]
        if ended.status != 2 or not named:
            made.report("status", f"{ended.status}: {ended.output[-1500:]}")
    if bad := list(unreadable(folder / "run")):
        made.report("silent", f"half files: {bad}")


@contextmanager
def small_disk(folder: Path, size: int) -> Iterator:
    """Let a folder be a file system of so many bytes; what is yielded makes it larger."""
    options = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    subprocess.run(options, check=True)
    grown = ["mount", "-o", "remount,size=64m", str(folder)]
    try:
        yield lambda: subprocess.run(grown, check=True)
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@cache
def mounts() -> bool:
    """Whether this process may mount a file system."""
    if os.geteuid():
        return False
    place = Path(f"/tmp/faults-{os.getpid()}")
    with suppress(OSError, subprocess.CalledProcessError):
        place.mkdir()
        with small_disk(place, PAGE):
            return True
    return False
