"""The tasks that docs/benchmarks.md names are those of the installed lm-eval."""

import re
from pathlib import Path

import pytest

lm_eval = pytest.importorskip("lm_eval")

from lm_eval.tasks import TaskManager  # noqa: E402

PAGE = Path(__file__).parents[2] / "docs" / "benchmarks.md"
TASKS = Path(lm_eval.__file__).parent / "tasks"
FOLDERS = (
    "babilong",
    "gsm8k",
    "hellaswag",
    "infinitebench",
    "longbench",
    "longbench2",
    "ruler",
)  # all take 8 s to read


def test_tasks_that_a_page_names_exist() -> None:
    page = PAGE.read_text()
    rows = "\n".join(re.findall(r"^\| --- \| --- \|\n((?:\|.*\n)+)", page, re.MULTILINE))
    cells = re.findall(r"^\| (`(?:ruler`|niah|babilong|gsm8k|longbench).*?) \|", rows, re.MULTILINE)
    named = {name for cell in cells for name in re.findall(r"`(\w+)`", cell) if not name.startswith("_")}
    named |= {name for tasks in re.findall(r"--tasks ([\w,]+)", page) for name in tasks.split(",")} - {"TASKS"}
    assert {"ruler", "niah_single_1", "gsm8k_cot", "longbench2", "babilong_longctx"} <= named
    manager = TaskManager(include_path=[str(TASKS / folder) for folder in FOLDERS], include_defaults=False)
    assert named <= set(manager.all_tasks)
