"""The presses that can be chosen, named without importing kvpress."""

PRESSES = (
    "snapkv",
    "tova",
    "observed",
    "expected",
    "kvzip",
    "ada-snapkv",
    "ada-expected",
    "duo-on-the-fly",
    "streaming-llm",
    "knorm",
)
SLOWEST = "kvzip"  # runs only if it is named
