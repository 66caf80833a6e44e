"""The names that `tasks` chooses from, apart from the tasks: a mistake is answered without importing torch."""

from collections.abc import Sequence
from itertools import pairwise

from duo_id.common.errors import check
from duo_id.common.mistakes import did_you_mean

RECALLED = (  # the tasks of published tables, each question of which is answered as if it were the only one
    "needle-words",
    "needle-numbers",
    "needle-sentences",
    "passkeys",
    "ruler-single",
    "ruler-multikey",
    "ruler-multivalue",
    "ruler-multiquery",
    "ruler-variables",
    "ruler-common-words",
    "ruler-frequent-words",
    "json-lookup",
    "copying",
    "list-reorder",
    "classification",
    "language",
    "rare-ngrams",
    "short",
)
TURNS = ("turns-words", "turns-numbers", "turns-json", "turns-mixed")
RULES = ("rules-json", "rules-codeword", "rules-words")
LONG = ("table-reformat", "list-all", "shown-work")
TASK_NAMES = (*RECALLED, *TURNS, *RULES, *LONG)  # of `duo_id.evaluate.tasks.registry`
GROUPS = {
    "all": RECALLED,
    "needle": tuple(name for name in RECALLED if name.startswith("needle-")),
    "ruler": tuple(name for name in RECALLED if name.startswith("ruler-")),
    "lookup": ("passkeys", "json-lookup", "copying", "list-reorder", "classification"),
    "text": ("language", "rare-ngrams"),
    "writing": (*TURNS, *RULES, *LONG),
    "turns": TURNS,
    "rules": RULES,
    "long": LONG,
}
LONGBENCH = "python -m duo_id.lm_eval --model duo_id --model_args heads=RUN,sparsity=0.5 --tasks longbench"
RULER_DATA = "ruler-data"
# The 13 tasks of the authors' synthetic.yaml.
RULER_TASKS = (
    "niah_single_1 niah_single_2 niah_single_3 niah_multikey_1 niah_multikey_2 niah_multikey_3 niah_multivalue "
    "niah_multiquery vt cwe fwe qa_1 qa_2"
).split()


def check_tasks(names: Sequence[str]) -> None:
    """Raise a `UserError` unless each name is a task, a group of tasks, or RULER's data or a part of it."""
    check_generated([name for name in names if not is_ruler_data(name)])
    expand_ruler([name for name in names if is_ruler_data(name)])


def check_generated(names: Sequence[str]) -> None:
    """Raise a `UserError` unless each name is a generated task or a group of them."""
    shown = (*GROUPS, *RECALLED, RULER_DATA)  # those of the other groups are named by their group
    for name in names:
        check(not name.startswith("longbench"), f"tasks={name}: LongBench is run by lm-eval: {LONGBENCH}")
        advice = f"choose among {_listed(shown)}{did_you_mean(name, (*shown, *TASK_NAMES))}"
        check(name in GROUPS or name in TASK_NAMES, f"tasks: there is no {name}, {advice}")


def _listed(names: Sequence[str]) -> str:
    """Names with commas; of several in a row that begin alike, all but the first from their dash on."""
    shown = [names[0]]
    for last, name in pairwise(names):
        start, dash, _ = name.partition("-")
        alike = dash and last.startswith(start + dash) and start in GROUPS
        shown.append(name.removeprefix(start) if alike else name)
    return ", ".join(shown)


def is_ruler_data(name: str) -> bool:
    """Whether a task's name means RULER's data or a part of it, known or not."""
    return name.partition("/")[0] == RULER_DATA


def expand_ruler(names: Sequence[str]) -> list[str]:
    """RULER's own names of the tasks that `names` mean, in this order, each once.

    Raises:
        UserError: there is no such task; the message lists all.
    """
    tasks: list[str] = []
    for name in names:
        task = name.removeprefix(RULER_DATA).removeprefix("/")
        choices = ", ".join(f"{RULER_DATA}/{one}" for one in RULER_TASKS)
        check(
            name == RULER_DATA or task in RULER_TASKS,
            f"tasks={name}: no such data set, choose {RULER_DATA} or {choices}",
        )
        tasks += RULER_TASKS if name == RULER_DATA else [task]
    return list(dict.fromkeys(tasks))
