"""Rates of the machine, as far as they can be tested without a clock."""

import pytest
import torch

from duo_id.benchmark import ceilings
from duo_id.benchmark.ceilings import measure_ceilings
from duo_id.benchmark.timing import Timing


def test_rates_count_reading_writing_and_both_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    def instead(run, device, repeats, warmup):
        run()
        return Timing((2.0, 0.5, 1.0))

    monkeypatch.setattr(ceilings, "time_runs", instead)
    monkeypatch.setattr(ceilings, "COPY_BYTES", {"cpu": 1000})
    monkeypatch.setattr(ceilings, "MATRIX", {"cpu": 10})
    rates = measure_ceilings(torch.device("cpu"), torch.float32)
    assert rates.bandwidth == 2 * 1000 / 0.5
    assert rates.flops == 2 * 10**3 / 0.5
