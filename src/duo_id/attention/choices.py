"""The names that settings choose from, apart from what they name: a mistake is answered without importing torch."""

BLEND_NAMES = ("student", "detached", "teacher")  # of `duo_id.attention.blends`
EVICTION_BUDGETS = ("uniform", "adaptive")  # of heads, see `duo_id.deploy.eviction`
EVICTION_SCORES = ("snapkv", "keydiff", "kvzip")  # of `duo_id.deploy.token_scores`
FULL_BACKENDS = ("auto", "sdpa", "cudnn", "flash", "flash_attn")
KV_FORMATS = ("exact", "int8", "k8v4", "int4")  # of `duo_id.attention.codes`
STREAMING_BACKENDS = ("auto", "blocked", "flex", "triton")
