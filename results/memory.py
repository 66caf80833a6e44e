"""The memory table of docs/requirements.md: `python results/memory.py`, from the widths of models, without weights."""

import torch

from duo_id.common.composing import compose
from duo_id.common.config import parse
from duo_id.distributed.ranks import Ranks
from duo_id.models.loading import meta_model
from duo_id.models.settings import ModelSettings
from duo_id.step.devices import calculated_costs
from duo_id.step.memory import GIB
from duo_id.step.recompute import Keep

MODELS = ("smollm2-135m", "qwen2.5-coder-0.5b", "qwen2.5-coder-1.5b", "qwen3-4b", "llama3-8b")
LENGTHS = (8192, 32768, 131072)  # tokens
FREE = (22.5, 79, 139)  # GiB of GPUs of 24, 80 and 141 GB that a program can have
MANY = 10**6  # tokens at which all costs have become proportional

for name in MODELS:
    config = compose("train", [f"model={name}", "model.init=random"]).model
    model = meta_model(parse(ModelSettings, config), torch.bfloat16)
    costs = calculated_costs(model, Ranks(), torch.device("cuda"))
    levels = {level: [level] * len(costs.kept) for level in (Keep.ALL, Keep.INPUT)}
    steps = [[costs.plan_for(kept, length, None).total / GIB for kept in levels.values()] for length in LENGTHS]
    longest = []
    for free in FREE:
        many, none = (costs.plan_for(levels[Keep.INPUT], tokens, int(free * GIB)) for tokens in (MANY, 0))
        longest.append(none.room / ((many.total - none.total) / MANY) / 1000)
    cells = [" / ".join(f"{size:.0f}" for size in pair) for pair in steps] + [f"{tokens:.0f}" for tokens in longest]
    print(f"| {name} | {' | '.join(cells)} |")
