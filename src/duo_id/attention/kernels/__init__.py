"""Triton kernels of streaming attention and of attention over the dual cache."""
