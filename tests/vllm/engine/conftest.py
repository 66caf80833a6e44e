"""vLLM in the process of the tests, and small."""

import os
from importlib.util import find_spec

if find_spec("vllm"):
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # its scheduler is looked at
    os.environ["VLLM_CPU_KVCACHE_SPACE"] = "1"  # GiB
    os.environ["VLLM_LOGGING_LEVEL"] = "ERROR"
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["OMP_NUM_THREADS"], os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "1", "nobind"  # as tests/conftest.py
    os.environ["TRITON_INTERPRET"] = "1"  # kernels for GPUs run here, too; vLLM itself uses none on CPUs
    os.environ.pop("DUO_ID_HEADS", None)
