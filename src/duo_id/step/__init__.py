"""One training step: teacher, student and objective; its memory, compilation and CUDA graphs."""
