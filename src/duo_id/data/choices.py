"""The names that settings choose from, apart from what they name: a mistake is answered without importing torch."""

DRAFTED_NAMES = ("passkey", "key_value", "copying", "multi_query", "text", "turns")  # samples put together from tokens
MIXED_NAMES = (*DRAFTED_NAMES, "self")  # tasks that a mixture can have
TASK_NAMES = (*MIXED_NAMES, "mixture", "disk")  # of `duo_id.data.registry`
