"""`python -m duo_id.evaluate`: which masks keep what the model can do."""
