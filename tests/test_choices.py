"""Names that settings choose from are those of what they name."""

from duo_id.attention.blends import BLENDS
from duo_id.attention.choices import BLEND_NAMES
from duo_id.data.choices import DRAFTED_NAMES, MIXED_NAMES
from duo_id.data.choices import TASK_NAMES as TRAINING_NAMES
from duo_id.data.registry import DRAFTED, MIXED, TRAINING_TASKS
from duo_id.evaluate.tasks.names import TASK_NAMES
from duo_id.evaluate.tasks.registry import EVALUATION_TASKS
from duo_id.methods.choices import GATE_NAMES, PENALTY_NAMES
from duo_id.methods.gates import GATES
from duo_id.methods.penalties import PENALTIES
from duo_id.step.choices import NEEDS_TEACHER
from duo_id.step.objectives import OBJECTIVES


def test_names_and_what_they_name_are_the_same() -> None:
    assert tuple(BLENDS) == BLEND_NAMES
    assert tuple(EVALUATION_TASKS) == TASK_NAMES
    assert tuple(DRAFTED) == DRAFTED_NAMES
    assert tuple(MIXED) == MIXED_NAMES
    assert tuple(TRAINING_TASKS) == TRAINING_NAMES
    assert tuple(GATES) == GATE_NAMES
    assert tuple(PENALTIES) == PENALTY_NAMES
    assert {name: objective.teacher for name, objective in OBJECTIVES.items()} == NEEDS_TEACHER
