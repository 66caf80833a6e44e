"""Which weights a model has, by a digest that takes milliseconds: what a model has made is found again by it."""

import hashlib
import json

import torch
from torch import Tensor
from transformers import PreTrainedModel

from duo_id.models.quantised import stored

PROBES = 512  # numbers of each tensor, evenly spaced: training changes some of them
UNREAD = ("transformers_version", "architectures", "dtype")  # of a config, beside what begins with _


def fingerprint(model: PreTrainedModel) -> str:
    """SHA-256 of a model's config and of some numbers of each of its weights, in their own dtype."""
    config = model.config.get_text_config().to_dict()
    kept = {key: value for key, value in config.items() if key not in UNREAD and key[0] != "_"}
    digest = hashlib.sha256(json.dumps(kept, sort_keys=True, default=str).encode())
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        for part in stored((tensor,)):
            digest.update(f"{name} {part.dtype} {tuple(part.shape)}".encode())
            digest.update(_probe(part.detach()).numpy().tobytes())
    return digest.hexdigest()


def _probe(tensor: Tensor) -> Tensor:
    """The bytes of some numbers of a tensor, (n,) uint8 on the CPU."""
    numbers = tensor.reshape(-1)
    if len(numbers) > PROBES:
        numbers = numbers[torch.arange(PROBES, device=numbers.device) * (len(numbers) - 1) // (PROBES - 1)]
    return numbers.contiguous().view(torch.uint8).cpu()
