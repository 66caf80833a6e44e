"""Rates of the machine, as far as they can be tested without a clock."""

import pytest
import torch

from duo_id.benchmark import ceilings
from duo_id.benchmark.ceilings import measure_ceilings
from duo_id.benchmark.timing import Timing


@pytest.mark.parametrize(("read", "copy", "bandwidth"), [(0.1, 0.5, 1000 / 0.1), (0.5, 0.1, 2 * 1000 / 0.1)])
def test_bandwidth_is_that_of_reading_or_of_copying_where_that_is_faster(
    read: float, copy: float, bandwidth: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    fastest = iter((read, copy, 0.5))

    def instead(run, device, repeats, warmup):
        run()
        return Timing((2.0, next(fastest), 1.0))

    monkeypatch.setattr(ceilings, "time_runs", instead)
    monkeypatch.setattr(ceilings, "BUFFER_BYTES", {"cpu": 1000})
    monkeypatch.setattr(ceilings, "MATRIX", {"cpu": 10})
    rates = measure_ceilings(torch.device("cpu"), torch.float32)
    assert rates.bandwidth == pytest.approx(bandwidth)
    assert rates.flops == 2 * 10**3 / 0.5
