"""Masks at work: the dual KV cache and how a model comes to use it."""
