"""Where processes of a test run."""

import pytest
import torch


def environment(device: str) -> dict[str, str]:
    """Variables of processes on `cpu`, or on two GPUs, without which the test is skipped."""
    if device == "cpu":
        return {"CUDA_VISIBLE_DEVICES": ""}
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    return {}
