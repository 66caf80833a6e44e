"""Runs the tests of tests/vllm/engine in the environment of `make vllm`."""

import os
import subprocess
from pathlib import Path

import pytest

from tests.support.smollm2 import embedded

ROOT = Path(__file__).parents[2]
PYTHON = ROOT / ".venv-vllm" / "bin" / "python"
FILES = sorted((Path(__file__).parent / "engine").glob("test_*.py"))


@pytest.mark.slow
@pytest.mark.skipif(not PYTHON.exists(), reason="make vllm sets up .venv-vllm")
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_in_the_environment_of_vllm(path: Path) -> None:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "PYTEST"))}
    paths = {"PYTHONPATH": str(ROOT / "src"), "DUO_ID_SMOLLM2": str(embedded())}
    command = [PYTHON, "-m", "pytest", "-q", "-n", "0", "-rs", path]
    done = subprocess.run(
        list(map(str, command)), cwd=ROOT, env=inherited | paths, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout or done.stderr
    assert "skipped" not in done.stdout, done.stdout
