"""The names that settings choose from, apart from what they name: a mistake is answered without importing torch."""

GATE_NAMES = ("clamp", "sigmoid", "hard_concrete", "straight_through", "nested")  # of `duo_id.methods.gates`
PENALTY_NAMES = ("l1", "binary", "target")  # of `duo_id.methods.penalties`
