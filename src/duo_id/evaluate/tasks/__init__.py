"""Generated tasks, their vocabulary, and how samples are built."""
