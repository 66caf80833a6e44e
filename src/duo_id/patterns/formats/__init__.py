"""Head patterns in the files of other tools: one module a family of formats, found by name in `registry`."""
