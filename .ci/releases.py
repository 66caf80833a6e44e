"""Run tests on other releases than the installed ones: `python .ci/releases.py oldest|newest [PYTEST ARGUMENT]...`.

`oldest` is transformers' lower bound in pyproject.toml; `newest` is what the registry has today of transformers,
lightning and datasets. Each is a folder of packages, made anew by every run, that comes first on the path; all else is
the running environment's.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
TESTS = "tests/attention tests/deploy tests/evaluate/test_reading.py tests/models/test_families.py".split()
TRAINING = "tests/data tests/train/test_run.py tests/train/test_gate_training.py tests/train/test_resume.py".split()


def oldest() -> list[str]:
    """The requirement of exactly the lower bound of transformers in pyproject.toml."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (bounds,) = (
        wanted.specifier for wanted in map(Requirement, project["dependencies"]) if wanted.name == "transformers"
    )
    (lowest,) = (bound.version for bound in bounds if bound.operator == ">=")
    return [f"transformers=={lowest}"]


def newest() -> list[str]:
    """The packages whose newest releases are tried, without bounds: releases beyond ours are the question."""
    return ["transformers", "lightning", "pytorch-lightning", "datasets"]


def install(requirements: list[str], overlay: Path) -> dict[str, str]:
    """Make the folder anew, with what its packages require and the environment lacks, and return each one's version."""
    shutil.rmtree(overlay, ignore_errors=True)
    while requirements:
        pip = [
            sys.executable,
            "-m",
            "pip",
            "install",
            "-qq",
            "--disable-pip-version-check",
            "--no-compile",
            "--no-deps",
        ]
        subprocess.run([*pip, "--upgrade", "--target", str(overlay), *requirements], check=True)
        requirements = sorted({str(wanted) for wanted in lacking(overlay)})
    return {canonicalize_name(found.name): found.version for found in metadata.distributions(path=[str(overlay)])}


def lacking(overlay: Path) -> Iterator[Requirement]:
    """What the overlay's packages require and neither it nor the environment has."""
    path = [str(overlay), *sys.path]
    for package in metadata.distributions(path=[str(overlay)]):
        for wanted in map(Requirement, package.requires or []):
            if wanted.marker is None or wanted.marker.evaluate({"extra": ""}):
                found = next(iter(metadata.distributions(name=wanted.name, path=path)), None)
                if found is None or not wanted.specifier.contains(found.version, prereleases=True):
                    yield Requirement(f"{wanted.name}{wanted.specifier}")


def main(which: str, *arguments: str) -> int:
    """Install, say what is tested, and test: tests/conftest.py fails where anything else was imported."""
    overlay = ROOT / "build" / which
    versions = install({"oldest": oldest, "newest": newest}[which](), overlay)
    releases = " ".join(f"{name}=={version}" for name, version in sorted(versions.items()))
    print(f"Testing {releases}", flush=True)
    tests = {"oldest": TESTS, "newest": [*TESTS, *TRAINING]}[which]
    if any((ROOT / argument.partition("::")[0]).exists() for argument in arguments):
        tests = []
    path = os.pathsep.join([str(overlay), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path, "DUO_ID_RELEASES": releases}
    command = [sys.executable, "-m", "pytest", "-n", "auto", *tests, *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment).returncode


if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] not in ("oldest", "newest"):
        sys.exit(__doc__)
    sys.exit(main(*sys.argv[1:]))
