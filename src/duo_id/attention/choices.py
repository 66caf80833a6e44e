"""The names that settings choose from, apart from what they name: a mistake is answered without importing torch."""

BLEND_NAMES = ("student", "detached", "teacher")  # of `duo_id.attention.blends`
FULL_BACKENDS = ("auto", "sdpa", "cudnn", "flash", "flash_attn")
STREAMING_BACKENDS = ("auto", "blocked", "flex", "triton")
