"""Where the time of a step goes, from a handmade trace."""

import pytest

from duo_id.benchmark.profiling import communication, group_of


def kernel(name: str, start: float, end: float, cat: str = "kernel") -> dict[str, object]:
    return {"ph": "X", "cat": cat, "name": name, "ts": 1000 * start, "dur": 1000 * (end - start)}


def test_kernels_have_their_groups() -> None:
    assert group_of("_streaming_key_gradients") == group_of("streaming_prefill") == "streaming attention"
    assert group_of("_decode") == "decode attention"
    assert group_of("cudnn_generated_fort_native_sdpa_sm90_flash_fprop") == "full attention"
    assert group_of("nvjet_tst_128x256_64x4") == group_of("sm90_xmma_gemm_bf16") == "matrix products"
    assert group_of("cutlass3x_sm90_tensorop_bf16_stream_k_gemm") == group_of("gemvx") == "matrix products"
    assert group_of("triton_poi_fused_mul_silu_0") == "elementwise"
    assert group_of("ncclDevKernel_AllGather") == group_of("gloo:all_to_all") == "communication"
    assert group_of("Memset (Device)") == "other"


def test_communication_that_nothing_hides_is_exposed() -> None:
    events = [
        {"ph": "M", "name": "process_name"},
        kernel("nccl:_all_gather_base", 0, 20, cat="gpu_user_annotation"),
        kernel("Memset (Device)", 0, 1, cat="gpu_memset"),
        kernel("nvjet_tst_128x256_64x4", 10, 14),
        kernel("ncclDevKernel_AllGather_RING_LL", 12, 18),  # 2 hidden
        kernel("ncclDevKernel_SendRecv", 17, 20),  # 1 overlaps the other, 1 hidden
        kernel("cudnn_generated_sdpa_fprop", 19, 25),
        kernel("ncclDevKernel_AllReduce_Sum_f32_RING_LL", 28, 30),
        kernel("ncclDevKernel_SendRecv", 21, 22),  # all hidden
    ]
    assert communication(events) == pytest.approx(
        {"all_to_all": 4, "all_gather": 6, "reduce": 2, "all": 11, "exposed": 7, "step": 20}
    )


def test_one_device_exchanges_nothing() -> None:
    assert communication([kernel("nvjet_tst_128x256_64x4", 10, 14)]) == {}
