"""Identification without gradients through training: scores read off a model, and searches over masks."""
