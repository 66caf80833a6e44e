"""Set a training step up: compiled if asked for, and within its memory budget."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

from duo_id.step.compiled import compiled_parts
from duo_id.step.distillation import Distillation
from duo_id.step.measured_costs import measure_costs
from duo_id.step.memory import MemoryPlanner, Plan, available
from duo_id.step.recompute import FIXED, Keep, activation_checkpointing
from duo_id.step.settings import StepSettings

ApplyPlan = Callable[[int], Plan | None]


@contextmanager
def prepared_step(distillation: Distillation, step: StepSettings, priced: int = 0) -> Iterator[ApplyPlan]:
    """Compile the model and checkpoint its activations, as the settings say, within the block.

    Args:
        distillation: the model and the objective.
        step: the settings.
        priced: other spans that each head attends to; see `measure_costs`.

    Yields:
        a function to call with the number of tokens before each step; it returns the memory plan, if there is one.

    Raises:
        UserError: the memory budget cannot be parsed; from the yielded function: it is too small.
    """
    model, layers = distillation.gated_model.model.model, distillation.gated_model.layers
    keep = FIXED.get(step.memory, Keep.ALL)
    # Several ranks must all do the same, and sharded weights come and go: see `duo_id.step.devices`.
    planned = step.memory not in FIXED and distillation.gated_model.model.ranks.world == 1
    budget = available(step.memory, model.device) if planned else None
    with (
        compiled_parts(model, layers, attention=True) if step.compile else nullcontext(),
        activation_checkpointing(model, layers, keep) if budget is not None or keep else nullcontext() as recomputation,
    ):
        if budget is None:
            yield lambda tokens: None
            return
        assert recomputation is not None
        yield MemoryPlanner(recomputation, measure_costs(distillation, recomputation, priced), budget).apply_plan
