"""A tiny model under the benchmark, shared by its tests."""

from collections.abc import Callable
from pathlib import Path

import torch
from transformers import PreTrainedModel

from duo_id.attention.functions import Backends
from duo_id.attention.interface import routed
from duo_id.attention.layers import AttentionLayer
from duo_id.benchmark.caches import CacheBench
from duo_id.benchmark.ceilings import Ceilings
from duo_id.benchmark.roofline import workload
from duo_id.benchmark.settings import BenchmarkSettings
from duo_id.models.language_model import LanguageModel
from duo_id.models.loading import byte_tokenizer
from duo_id.models.settings import ModelSettings
from duo_id.patterns.pattern import HeadMask

SINK, RECENT = 4, 8
MIXED = torch.tensor([[True, False], [False, False], [True, True]])  # retrieval heads of 3 layers x 2 KV heads


def mask(retrieval: torch.Tensor = MIXED) -> HeadMask:
    return HeadMask(retrieval, SINK, RECENT)


def named(model: PreTrainedModel) -> LanguageModel:
    return LanguageModel(model, byte_tokenizer(), "tiny", "tiny", None, "random")


def layers_of(model: PreTrainedModel) -> list[AttentionLayer]:
    with routed(model, Backends()) as layers:
        return layers


def make_bench(
    model: PreTrainedModel, announce: Callable[[str], None] = lambda phase: None, **changes: object
) -> CacheBench:
    sizes = {"task": "decode", "context": [20, 50], "chunk_size": [8], "sparsity": [0.5], "repeats": 3, "warmup": 1}
    settings = BenchmarkSettings(
        **{"model": ModelSettings("tiny"), "sink_size": SINK, "recent_size": RECENT, **sizes, **changes}
    )
    layers = layers_of(model)
    return CacheBench(settings, model, layers, workload(model, layers), Ceilings(1e9, 1e10), Path(), announce)
