"""Tests that run in the environment of `make vllm`, where `tests/vllm/test_engine.py` starts them."""
