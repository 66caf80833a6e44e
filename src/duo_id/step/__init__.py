"""One training step: teacher, student and objective, what it keeps in memory, compiles and replays."""
