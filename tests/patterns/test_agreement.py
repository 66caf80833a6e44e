from io import StringIO

import torch
from rich.console import Console

from duo_id.patterns.agreement import agreement_table
from duo_id.patterns.pattern import HeadPattern


def test_the_table_fits_a_terminal() -> None:
    scores = torch.tensor([[0.1, 0.9], [0.3, 0.2]])
    patterns = {f"seed {seed}": HeadPattern(values, 2, 4) for seed, values in enumerate((scores, scores, 1 - scores))}
    console = Console(width=80, file=StringIO())
    console.print(agreement_table(patterns, [0.5, 0.75]))
    lines = [line.split() for line in console.file.getvalue().splitlines()]  # type: ignore[attr-defined]
    assert lines[0] == ["3", "runs"]
    assert ["agreement", "mean", "minimum"] in lines
    assert [*"rank correlation, of the scores".split(), "-0.33", "-1.00"] in lines
    assert [*"shared retrieval heads, 50% stream".split(), "0.33", "0.00"] in lines
    assert any(line[:4] == ["shared", "retrieval", "heads,", "75%"] for line in lines)
