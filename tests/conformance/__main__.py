"""transformers' own generation tests, from a source tree of the installed release, with every model under a head mask.

Options that are not listed go to pytest. Nothing of that tree is part of this project.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

HERE = Path(__file__).resolve().parent
MASKS = ("full", "wide", "narrow")


def main() -> int:
    """Run each family's tests under each mask, and return whether any failed."""
    parser = argparse.ArgumentParser("python tests/conformance", description=__doc__)
    parser.add_argument("tree", type=Path)
    parser.add_argument("families", nargs="+", metavar="family")
    parser.add_argument("--mask", action="append", choices=("none", *MASKS), help="default: all but none, in turn")
    arguments, options = parser.parse_known_args()
    tree = arguments.tree.resolve()
    files = [f"tests/models/{family}/test_modeling_{family}.py" for family in arguments.families]
    if missing := [file for file in files if not (tree / file).is_file()]:
        parser.error(f"{tree} has no {', '.join(missing)}")
    print(f"transformers {metadata.version('transformers')}; tests of {_release(tree)}", flush=True)
    codes = []
    for mask in arguments.mask or MASKS:
        path = os.pathsep.join([*filter(None, [os.environ.get("PYTHONPATH")]), str(HERE)])
        environment = {**os.environ, "DUO_ID_CONFORMANCE": mask, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, "-m", "pytest", "-c", os.devnull, "--rootdir", str(tree), "--noconftest"]
        command += [
            "-p",
            "masked",
            "-p",
            "no:cacheprovider",
            "-q",
            "-m",
            "generate",
            "--tb=short",
            "--disable-warnings",
            "--show-capture=no",
            *files,
            *options,
        ]
        codes.append(subprocess.run(command, cwd=tree, env=environment).returncode)
    return max(codes)


def _release(tree: Path) -> str:
    for line in (tree / "setup.py").read_text().splitlines():
        if line.strip().startswith("version="):
            return line.split('"')[1]
    return "an unknown release"


if __name__ == "__main__":
    sys.exit(main())
