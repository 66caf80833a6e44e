"""Faults: commands that are killed, whose disk is full or read-only, and that meet others in one folder.

`python -m tests.faults --seed 0 --trials 200` is the long campaign; a short part of it is in the suite. A trial is a
function of its seed: `python -m tests.faults --only KIND/COMMAND/SEED` does one again.
"""
