"""Multiple processes: their ranks, how they are launched, and how they share a model's weights."""
