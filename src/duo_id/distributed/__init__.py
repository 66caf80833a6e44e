"""Several processes: who they are, how they are started, and how they share a model's weights."""
