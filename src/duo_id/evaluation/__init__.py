"""Which masks keep what the model can do."""
