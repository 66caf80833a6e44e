"""A step is captured where there is a GPU."""

import torch

from duo_id.deploy.graphs import capture_graph


def test_on_the_cpu_nothing_is_captured() -> None:
    def step() -> str:
        return "done"

    assert capture_graph(step, torch.device("cpu")) is step
