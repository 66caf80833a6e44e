"""A few of the kernels' tests in Triton's interpreter, so that a kernel that is wrong is found without a GPU."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

CHOSEN = (
    "test_decode.py::test_decode_over_rings_that_programs_share[spans-3]",
    "test_decode.py::test_decode_over_any_window[mixed-(3, 8)]",
    "test_decode.py::test_decode_after_eviction[mixed-37]",
    "test_decode.py::test_decode_over_heads_of_unequal_lengths[mixed-torch.float32]",
    "test_decode.py::test_shares_divide_the_machine_among_heads",
    "test_decode_codes.py::test_around_the_edges_of_groups[[126, 127, 128]-torch.float32-int4]",
    "test_decode_codes.py::test_around_the_edges_of_groups[[126, 127, 128]-torch.float32-int8]",
    "test_decode_codes.py::test_around_the_edges_of_groups[[129, 255, 0]-torch.float16-k8v4]",
    "test_paged.py::test_a_step_is_attention_over_whole_contexts[all-decode]",
    "test_paged.py::test_a_step_is_attention_over_whole_contexts[usual-mixed]",
    "test_paged.py::test_programs_share_a_context_and_leave_their_workspace_as_it_was",
    "test_prefill.py::test_stream_over_rings_that_still_grow[rings]",
    "test_prefill.py::test_stream_beyond_the_windows[spans]",
    "test_streaming.py::test_a_span_for_each_head[[33, 2, 1]-3]",
)


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
def test_kernels_on_the_cpu() -> None:
    """In a process of its own, because Triton reads the variable when it is imported."""
    folder = Path(__file__).parent
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-m", "gpu", *(f"{folder}/{test}" for test in CHOSEN)]
    environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=folder.parents[2])
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert f"{len(CHOSEN)} passed" in finished.stdout
