"""The table of docs/performance.md on objectives over a large vocabulary: `python results/objective.py` on a GPU.

With liger-kernel installed, its fused linear Jensen-Shannon loss at beta 0 is measured too, which is the objective kl.
"""

import time
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from duo_id.step.chunks import ChunkedObjective
from duo_id.step.objectives import OBJECTIVES, Objective, Outputs

WORDS, RUNS = 151936, 3
AT_ONCE = 4096  # tokens whose logits all fit, several times over


def measure(label: str, run: Callable[[], Any]) -> None:
    """Print mean milliseconds and the peak of what a run allocates."""
    run()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before, start = torch.cuda.memory_allocated(), time.perf_counter()
    for _ in range(RUNS):
        run()
    torch.cuda.synchronize()
    milliseconds = (time.perf_counter() - start) / RUNS * 1e3
    gibibytes = (torch.cuda.max_memory_allocated() - before) / 2**30
    print(f"{label}: {milliseconds:.0f} ms, {gibibytes:.2f} GiB", flush=True)


def measure_all(width: int, tokens: int) -> None:
    """All ways to the loss and its gradient for the student's states."""
    weight = (torch.randn(WORDS, width, device="cuda") * 0.03).bfloat16()
    states = torch.randn(tokens, width, device="cuda").bfloat16().requires_grad_()
    others = (states.detach() + 0.1 * torch.randn(tokens, width, device="cuda")).bfloat16()
    targets = torch.randint(0, WORDS, (tokens,), device="cuda")
    weights = torch.full((tokens,), 1 / tokens, device="cuda")
    student, teacher = (Outputs(each, targets=targets, predicting=each) for each in (states, others))

    def head(hidden: Tensor) -> Tensor:
        return hidden @ weight.T

    def in_chunks(objective: Objective) -> Callable[[], Any]:
        chunked = ChunkedObjective(objective, head, WORDS)
        return lambda: torch.autograd.grad(chunked.loss(student, teacher, weights), states)

    def at_once() -> Any:
        whole = [Outputs(each.hidden, (), head(each.hidden), targets) for each in (student, teacher)]
        return torch.autograd.grad((OBJECTIVES["kl_next_token"](*whole) * weights).sum(), states)

    label = f"{tokens} tokens of width {width}"
    if tokens <= AT_ONCE:
        measure(f"{label}, kl_next_token at once", at_once)
    for name in ("kl_next_token", "kl"):
        measure(f"{label}, {name} in chunks", in_chunks(OBJECTIVES[name]))
    compiled = torch.compile(OBJECTIVES["kl_next_token"].function)
    measure(f"{label}, kl_next_token in chunks, compiled", in_chunks(Objective(compiled, logits=True)))
    if find_spec("liger_kernel"):
        from liger_kernel.ops.fused_linear_jsd import LigerFusedLinearJSDFunction as Liger

        def liger() -> Any:
            return torch.autograd.grad(Liger.apply(states, weight, others, weight, None, 0.0, -100, 1.0), states)

        measure(f"{label}, kl by Liger", liger)


if __name__ == "__main__":
    for width in (896, 1536):
        for tokens in (AT_ONCE, 15000, 32000):
            measure_all(width, tokens)
