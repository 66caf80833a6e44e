"""`python -m duo_id.train`: find a model's retrieval heads."""
