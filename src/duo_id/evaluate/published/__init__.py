"""Published long-context benchmarks, read as their authors publish them."""
