"""The generated tasks, their words and the text they are hidden in."""
