"""Full, streaming and gated attention for every model family, through transformers' attention registry."""
