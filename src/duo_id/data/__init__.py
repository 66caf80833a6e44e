"""Samples: the haystacks, the tasks that hide needles in them, and the loaders that hand them on."""
