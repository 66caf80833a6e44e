"""`python -m duo_id.lm_eval`: head masks in the language model evaluation harness."""
