"""`python -m duo_id.benchmark`: speed and memory under a head mask, beside full attention and the ceilings."""
