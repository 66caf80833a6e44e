"""Rates of the machine, as far as a test can tell without a clock."""

import pytest
import torch

from duo_id.benchmark import ceilings
from duo_id.benchmark.ceilings import measure_ceilings
from duo_id.benchmark.timing import Timing


def test_rates_count_reading_writing_and_both_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    def instead(run, device, repeats, warmup):
        run()
        return Timing((2.0, 0.5, 1.0))

    monkeypatch.setattr(ceilings, "timed", instead)
    monkeypatch.setattr(ceilings, "COPY_BYTES", {"cpu": 1000})
    monkeypatch.setattr(ceilings, "MATRIX", {"cpu": 10})
    found = measure_ceilings(torch.device("cpu"), torch.float32)
    assert found.bandwidth == 2 * 1000 / 0.5
    assert found.flops == 2 * 10**3 / 0.5
