"""Runs in the peers' environment: what HeadPatternPress of duo_id makes of a model's answer, as JSON."""

import json
import sys

import torch
from kvpress import DuoAttentionPress
from transformers import AutoModelForCausalLM, DynamicCache

from duo_id.common.errors import UserError
from duo_id.kvpress import HeadPatternPress

folder, heads, misfit, context, asked = (json.loads(argument) for argument in sys.argv[1:])
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa").eval()
told: dict[str, object] = {"logits": {}, "streaming": {}, "ratio": {}}
for sparsity in (0.0, 0.5, 1.0):
    press = HeadPatternPress(heads=heads, sparsity=sparsity)
    assert isinstance(press, DuoAttentionPress)
    cache = DynamicCache()
    with torch.no_grad():
        with press(model):
            model(input_ids=torch.tensor([context]), past_key_values=cache)
        logits = model(input_ids=torch.tensor([asked]), past_key_values=cache).logits
    told["logits"][sparsity] = logits[0].tolist()
    told["streaming"][sparsity] = press.streaming_mask.tolist()
    told["ratio"][sparsity] = press.compression_ratio
try:
    with HeadPatternPress(heads=misfit)(model):
        pass
except UserError as error:
    told["misfit"] = str(error)
print(json.dumps(told))
