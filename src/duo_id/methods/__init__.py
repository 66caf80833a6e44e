"""Methods that find retrieval heads: trained gates, scores read off the model, and searches over masks."""
