"""How a training step is computed: the loss in our shape or in the published one, compiled, within its memory."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

from duo_id.step.compiled import compiled_parts
from duo_id.step.distillation import Distillation
from duo_id.step.memory import MemoryPlanner, Plan, available, measure_costs
from duo_id.step.recompute import FIXED, Keep, recomputed
from duo_id.step.settings import StepSettings

ApplyPlan = Callable[[int], Plan | None]


@contextmanager
def prepared(distillation: Distillation, step: StepSettings) -> Iterator[ApplyPlan]:
    """Compile the model and let it recompute as the settings say, for a block.

    Yields:
        what is to be called with the number of tokens before each step; it returns the plan, if there is one to make.

    Raises:
        UserError: the memory's budget cannot be read; by what is yielded: it is not enough.
    """
    model, layers = distillation.gated_model.model.model, distillation.gated_model.layers
    keep = FIXED.get(step.memory, Keep.ALL)
    # Several ranks must do the same, and what each has of the weights comes and goes: see `duo_id.step.devices`.
    planned = step.memory not in FIXED and distillation.gated_model.model.ranks.world == 1
    budget = available(step.memory, model.device) if planned else None
    with (
        compiled_parts(model, layers, attention=True) if step.compile else nullcontext(),
        recomputed(model, layers, keep) if budget is not None or keep else nullcontext() as recomputation,
    ):
        if budget is None:
            yield lambda tokens: None
            return
        assert recomputation is not None
        yield MemoryPlanner(recomputation, measure_costs(distillation, recomputation), budget).apply_plan
