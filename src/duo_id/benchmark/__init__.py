"""`python -m duo_id.benchmark`: speed and memory under a head mask, against full attention and the ceilings."""
