"""Loading any causal language model, frozen, with its tokenizer, and describing it."""
