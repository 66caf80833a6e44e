"""Ways to find retrieval heads: by gates that are trained, by scores read off a model, by searches over masks."""
